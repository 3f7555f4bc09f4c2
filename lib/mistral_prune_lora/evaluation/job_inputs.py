"""What the workflow's jobs of an evaluation read and write, and what their results are called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.pruning_identity import KEY, check_same_pruning
from mistral_prune_lora.checkpoints.undo import put_back
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.streaming.compute import LayerSource
from mistral_prune_lora.streaming.record import RunRecord, tensors_sha256


@dataclass(frozen=True)
class RunInputs:
    """What a job runs, on what.

    Attributes:
        model_dir: the A model, merged A or dense model: configuration, and embedding, norm and head where the run
            reaches them.
        weights_dir: the model or bundle that holds the layers; None means the model.
        layers: original indices, ascending; none if a stage ends where `source` ends.
        windows: a file of windows.
        source: the parent segment's activations; None starts from the token ids.
        parts: the directories of all parts of the stage, A's first, where its bundles put original tensors back; empty
            where nothing is put back.
    """

    model_dir: str | Path
    weights_dir: str | Path | None
    layers: Sequence[int]
    windows: str | Path
    source: str | Path | None = None
    parts: Sequence[str | Path] = ()

    @cached_property
    def _restored(self) -> list[Checkpoint]:
        """The parts, with what is put back; none where nothing is."""
        return put_back([open_checkpoint(each) for each in self.parts])

    @cached_property
    def opened(self) -> tuple[Checkpoint, Checkpoint]:
        """The model, and what holds the layers, with what is put back; errors as for `run_segment`."""
        wanted = [Path(os.path.abspath(each)) for each in (self.model_dir, self.weights_dir or self.model_dir)]
        if not self.parts:
            model, holder = map(open_checkpoint, wanted)
            check_same_pruning(wanted)
            return model, holder
        check_same_pruning(self.parts)
        opened = {part.path: part for part in self._restored}
        return opened[wanted[0]], opened[wanted[1]]

    def check_origin(self, record: RunRecord) -> None:
        """Raise a DataError if the layers before were run with other weights than those that are put back."""
        for part in self._restored:
            for layer in set(part.layers) & set(record.layers):
                if record.weights[f"layers.{layer:03d}"] != tensors_sha256(part.layer(layer)):
                    told = f"was run with other weights of layer {layer} than the stage has"
                    raise DataError(told, where=self.source, mend="Delete it and run its segment again")

    def sources(self, holder: Checkpoint) -> list[LayerSource]:
        """The layers, of the checkpoint that holds them."""
        return [LayerSource(layer, holder) for layer in self.layers]


@dataclass(frozen=True)
class StageOutputs:
    """Where a stage's score goes.

    Attributes:
        result_json: the result, see `StageResult`.
        window_parquet: NLL and the rest, a row a window; a shard has none.
        final_hidden: also keep the final hidden states (before the norm) in this file, for others to compare with.
    """

    result_json: str | Path
    window_parquet: str | Path | None
    final_hidden: str | Path | None = None


def about_result(stage: str, subject: Subject, inputs: RunInputs) -> dict[str, str | None]:
    """What a result is called, and the pruning that its parts are of."""
    identity = check_same_pruning([part.path for part in inputs.opened])
    return {"stage": stage, "label": subject.label(stage), KEY: identity}
