"""The one loop: windows run through layers, and what leaves the last of them goes into a sink, resumable.

Batches that a killed run has finished are never computed again; what is computed has the bits of an undisturbed run,
since batch k is always the same windows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from mistral_prune_lora.console import progress
from mistral_prune_lora.storage.activations import ActivationWriter, open_finished
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.batches import DelayedStore, stream_batches
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.faults import layers_blamed
from mistral_prune_lora.streaming.memory import resident_groups
from mistral_prune_lora.streaming.passage import Boundary, Origin, Passage


class BatchSink(Protocol):
    """What becomes of the hidden states that leave a group of layers, batch by batch."""

    @property
    def done(self) -> Collection[int]:
        """The batches that it needs no more."""

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Take the hidden states of a batch, on the compute device, shape (n, seqlen, hidden)."""

    def flush(self) -> None:
        """Wait for what is still on its way; called after the last batch."""

    def status(self) -> str:
        """What the progress bar says of the result so far; empty if nothing."""


class Sink(BatchSink, Protocol):
    """What becomes of the hidden states that leave the last layer of a run, which may be continued after a kill.

    Attributes:
        place: the file that it fills; what goes between two groups of layers lies hidden beside it.
    """

    place: Path

    @property
    def words(self) -> str | None:
        """What is being run, for the progress bar; None if the layers say enough."""

    @property
    def nbytes(self) -> int:
        """Memory on the compute device that it takes."""


class KeptActivations:
    """A sink that keeps the hidden states in a file of boundary activations; a context manager."""

    nbytes = 0
    words = None

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int, int],
        compute: Compute,
        run: Mapping,
        *,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Begin the file, or go on where a killed run with an equal record stopped.

        Args:
            path: where the finished file goes.
            shape: (windows, seqlen, hidden).
            compute: gives dtype, batch size and device.
            run: the record that is kept with them.
            change: makes what is kept of a batch; same shape and dtype. None keeps it as it is.

        Raises:
            PipelineError: as for `ActivationWriter`.
        """
        self.place, self._change = Path(path), change
        self._writer = ActivationWriter(path, shape, compute.dtype, compute.batch_size, run)
        self._store = DelayedStore(self._writer.write, compute)

    @property
    def done(self) -> Collection[int]:
        """The batches that are in the file."""
        return self._writer.done

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """See `Sink.put`."""
        self._store.put(batch, self._change(hidden) if self._change else hidden)

    def flush(self) -> None:
        """See `Sink.flush`."""
        self._store.flush()

    def status(self) -> str:
        """Nothing to say."""
        return ""

    def finish(self) -> None:
        """Put the complete file in its place."""
        self._writer.finish()

    def close(self) -> None:
        """Let go of the file; an unfinished one stays for the next run."""
        self._writer.close()

    def __enter__(self) -> KeptActivations:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def run_layers(passage: Passage, origin: Origin, sources: Sequence[LayerSource], sink: Sink) -> None:
    """Run windows through layers; those that do not fit into memory at once go through files beside the sink's.

    Args:
        passage: the windows, and how they are run.
        origin: where they set out from.
        sources: the layers, in order; none hands the origin's hidden states on.
        sink: takes what leaves the last of them. What it has already is not computed.

    Raises:
        CheckpointError: a tensor is missing or does not fit.
        NumberError: hidden states hold NaN or infinity; says which tensor or layers brought them.
        PipelineError: memory or disk space does not suffice.
    """
    compute, scratch = passage.compute, None
    if there := _continued(passage, origin, sources, sink.place):
        sources, scratch = sources[there[0] :], there[1]
        origin = Boundary(passage, scratch)
    reserved = origin.nbytes + sink.nbytes
    seqlen, apart = passage.windows.seqlen, passage.windows.positions is not None
    groups = resident_groups(sources, compute, passage.config, seqlen, reserved, apart) or [[]]
    backbone = Backbone(passage.config, compute)
    for group in backbone.resident(groups):
        if group is groups[-1]:
            _run_group(passage, backbone, origin, group, sink)
        else:
            kept = _scratch_file(sink.place, group[-1])
            run = origin.record.after(group, compute).content()
            with KeptActivations(kept, passage.shape, compute, run) as between:
                _run_group(passage, backbone, origin, group, between)
                between.finish()
            origin = Boundary(passage, kept)
            if scratch:
                scratch.unlink()
            scratch = kept
    for leftover in sink.place.parent.glob(f".{sink.place.name}.after-*"):
        leftover.unlink()


def run_to_file(passage: Passage, origin: Origin, sources: Sequence[LayerSource], path: str | Path) -> None:
    """Run windows through layers and keep the boundary activations at their end; errors as `run_layers`."""
    record = origin.record.after(sources, passage.compute)
    with KeptActivations(path, passage.shape, passage.compute, record.content()) as sink:
        run_layers(passage, origin, sources, sink)
        sink.finish()


def run_batches(
    backbone: Backbone,
    read: Callable[[int, int], torch.Tensor],
    windows: int,
    sink: BatchSink,
    bar: tqdm,
    watch: Callable[[int, int, torch.Tensor], None] | None = None,
    positions: Callable[[int], torch.Tensor | None] | None = None,
) -> None:
    """Run all batches that a sink has not through the resident layers.

    Args:
        backbone: holds the layers.
        read: gives windows a..b-1 as a CPU tensor (b - a, seqlen, hidden).
        windows: how many there are.
        sink: takes what leaves the last layer.
        bar: counts token ids.
        watch: called with batch, layer and what leaves that layer.
        positions: gives those of a batch's tokens, as `Backbone` takes them; None counts each window from 0.
    """
    compute = backbone.compute
    missing = [b for b in range(-(-windows // compute.batch_size)) if b not in sink.done]
    for batch, entering in stream_batches(read, missing, windows, compute):
        told = _watching(watch, batch) if watch else None
        leaving = backbone(entering, told, positions(batch) if positions else None)
        sink.put(batch, leaving)
        if status := sink.status():
            bar.set_postfix_str(status, refresh=False)
        bar.update(leaving.shape[0] * leaving.shape[1])
    sink.flush()


def _watching(watch: Callable[[int, int, torch.Tensor], None], batch: int) -> Callable[[int, torch.Tensor], None]:
    return lambda layer, hidden: watch(batch, layer, hidden)


def _run_group(passage: Passage, backbone: Backbone, origin: Origin, group: Sequence[LayerSource], sink: Sink) -> None:
    words = sink.words or f"layers {group[0].index}-{group[-1].index}"
    there = sum(passage.ids_of(batch).numel() for batch in sink.done)
    with (
        progress(
            total=passage.windows.ids.numel(), description=words, unit="tok", initial=there, unit_scale=True
        ) as bar,
        layers_blamed(origin, group, passage, words),
    ):
        run_batches(backbone, origin.read, len(passage.windows), sink, bar, positions=passage.positions_of)


def _continued(
    passage: Passage, origin: Origin, sources: Sequence[LayerSource], place: Path
) -> tuple[int, Path] | None:
    """How many layers a killed run, whatever memory it had, has gone, and the file at their end; None if none."""
    for count in reversed(range(1, len(sources))):
        file = _scratch_file(place, sources[count - 1])
        if file.is_file() and open_finished(file, origin.record.after(sources[:count], passage.compute).content()):
            return count, file
    return None


def _scratch_file(place: Path, last: LayerSource) -> Path:
    return place.with_name(f".{place.name}.after-{last.index:03d}.safetensors")
