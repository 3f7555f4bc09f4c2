"""The passes that a calibration makes: to what enters a corrected layer, to what is wanted behind it, and its moments.

Runs of equal layers are made once: boundary activations are named by everything that they depend on, so the student's
way is the dense model's as far as their layers agree, and a calibration that was killed goes on from what is there, or
from what somebody else has made of the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mistral_prune_lora.closed_form.correction import FeatureTap
from mistral_prune_lora.closed_form.regression import Moments, Sums
from mistral_prune_lora.closed_form.settings import CalibrationText
from mistral_prune_lora.console import progress
from mistral_prune_lora.storage.activations import ActivationReader, open_finished
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.faults import layers_blamed
from mistral_prune_lora.streaming.passage import Boundary, Origin, Passage
from mistral_prune_lora.streaming.record import RunRecord
from mistral_prune_lora.streaming.run import run_batches, run_to_file


@dataclass(frozen=True)
class Calibration:
    """One text on its way through student and dense model.

    Attributes:
        text: its windows.
        student, dense: the passages; equal windows and arithmetic.
        folder: where boundary activations go, hidden.
        given: files of boundary activations to go on from where they lie on the way; others are left alone.
    """

    text: CalibrationText
    student: Passage
    dense: Passage
    folder: Path
    given: Sequence[str | Path] = ()

    def entering(self, sources: Sequence[LayerSource]) -> Origin:
        """What leaves the student's first layers; the token ids if there are none."""
        return self._end(self.student, sources)

    def wanted(self, sources: Sequence[LayerSource]) -> Origin:
        """What leaves the dense model's first layers."""
        return self._end(self.dense, sources)

    def moments(
        self, origin: Origin, source: LayerSource, wanted: Origin, token_weights: str
    ) -> tuple[Moments, Moments | None]:
        """The moments of a layer's features and of what its output lacks, of the windows solved for and held out.

        Args:
            origin: what enters the layer.
            source: the layer.
            wanted: what its output is to come to.
            token_weights: of `ClosedFormSettings`.
        """
        passage, tap = self.student, FeatureTap()
        backbone = Backbone(passage.config, passage.compute)
        tapped = LayerSource(source.index, source.checkpoint, (*source.adapters, tap))
        sink = _Regressed(self.text, wanted, tap, passage.compute, token_weights)
        words = f"layer {source.index}"
        for _ in backbone.resident([[tapped]]):
            with (
                progress(
                    total=passage.windows.ids.numel(), description=f"regress {words}", unit="tok", unit_scale=True
                ) as bar,
                layers_blamed(origin, [source], passage, words),
            ):
                run_batches(backbone, origin.read, len(passage.windows), sink, bar)
        return sink.moments()

    def _end(self, passage: Passage, sources: Sequence[LayerSource]) -> Origin:
        """What leaves the last of some layers, run on from the furthest point that is there."""
        start: Origin = passage.origin(None)
        records = [start.record]
        for source in sources:
            records.append(records[-1].after([source], passage.compute))
        last = self._own(records[-1])
        for n in range(len(sources), 0, -1):
            if there := self._there(records[n]):
                start, sources = Boundary(passage, there), sources[n:]
                break
        if sources:
            run_to_file(passage, start, sources, last)
            start = Boundary(passage, last)
        return start

    def _there(self, record: RunRecord) -> str | Path | None:
        """The file that holds what a run comes to: an own one, or a given one."""
        if open_finished(self._own(record), record.content()):
            return self._own(record)
        return next((path for path, run in self._given if record.other_than(run) is None), None)

    def _own(self, record: RunRecord) -> Path:
        return self.folder / f".{record.sha256[:24]}.safetensors"

    @cached_property
    def _given(self) -> list[tuple[str | Path, RunRecord]]:
        return [(path, RunRecord.parse(ActivationReader(path).run, path)) for path in self.given]


class _Regressed:
    """A sink that counts a layer's features and what its output lacks."""

    done: frozenset[int] = frozenset()

    def __init__(
        self, text: CalibrationText, wanted: Origin, tap: FeatureTap, compute: Compute, token_weights: str
    ) -> None:
        self._text, self._wanted, self._tap, self._compute = text, wanted, tap, compute
        self._by_norm = token_weights == "inverse_norm"
        self._sums: list[Sums] = []

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Count a batch."""
        first, features = batch * self._compute.batch_size, self._tap.features
        wanted = self._wanted.read(first, first + len(hidden)).to(hidden.device).double()
        lacking = wanted - hidden.double()
        if self._by_norm:
            # The square root: a squared error is divided by the norm. A state of zeros is no token's.
            square = wanted.square().mean(-1, keepdim=True)
            shares = square.pow(-0.25).masked_fill_(square == 0, 0.0)
            features, lacking = features.double() * shares, lacking.mul_(shares)
        if not self._sums:
            count = 1 + bool(self._text.held_out)
            self._sums = [Sums(features.shape[-1], hidden.shape[-1], hidden.device) for _ in range(count)]
        cut = min(max(self._text.solved - first, 0), len(hidden))
        for sums, part in zip(self._sums, (slice(0, cut), slice(cut, None)), strict=False):
            sums.add(features[part].flatten(0, 1), lacking[part].flatten(0, 1))

    def flush(self) -> None:
        """Nothing is on its way."""

    def status(self) -> str:
        """Nothing to say."""
        return ""

    def moments(self) -> tuple[Moments, Moments | None]:
        """Of the windows solved for, and of those held out if there are any."""
        found = [sums.moments() for sums in self._sums]
        return found[0], found[1] if len(found) > 1 else None
