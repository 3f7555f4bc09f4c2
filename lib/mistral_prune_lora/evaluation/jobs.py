"""The workflow's jobs of an evaluation: a segment of layers, and a stage's tail with its score.

Boundary activations are files between them, so that every run of layers that stages share is computed once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.pruning_identity import KEY, check_same_pruning
from mistral_prune_lora.checkpoints.undo import put_back
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.evaluation.result import StageResult, stage_result
from mistral_prune_lora.evaluation.scoring import DenseAnswers, Scoring
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.results.statistics import WindowScores
from mistral_prune_lora.storage.json_file import read_json, write_json
from mistral_prune_lora.storage.transaction import atomic_file
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.record import RunRecord, tensors_sha256
from mistral_prune_lora.streaming.run import run_layers, run_to_file
from mistral_prune_lora.streaming.shards import Shard, gather_activations, whole_record
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows


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


def run_segment(inputs: RunInputs, output: str | Path, compute: Compute, *, shard: Shard | None = None) -> None:
    """Run windows through the layers of one segment and keep the boundary activations at its end.

    A killed run is continued from its last finished batch, with the bits of an undisturbed one.

    Args:
        inputs: the layers and the windows.
        output: safetensors with "hidden_states", shape (windows, seqlen, hidden), in the compute dtype.
        compute: device, dtype, batch size, memory.
        shard: which of the windows; None takes all.

    Raises:
        DataError: windows or source are not what they should be, or the source was made of other windows.
        CheckpointError, LayoutError: weights are missing or do not fit, or are of another pruning than the model.
        NumberError: weights or hidden states hold NaN or infinity.
        PipelineError: memory or disk space does not suffice, or another process is writing `output`.
    """
    model, holder = inputs.opened
    passage = Passage(model, Windows.load(inputs.windows), compute).shard(shard)
    print(f"boundary activations: {passage.nbytes / 1e6:.1f} MB in {output}", file=sys.stderr)
    run_to_file(passage, passage.origin(inputs.source), inputs.sources(holder), output)


def score_stage(
    stage: str,
    inputs: RunInputs,
    outputs: StageOutputs,
    compute: Compute,
    *,
    dense: DenseAnswers | None = None,
) -> StageResult:
    """Run a stage's tail from its last boundary activations, and score every window.

    Args:
        stage: "A", "AB" or "FULL"; a dense model is "FULL".
        inputs: the tail and the windows.
        outputs: where the result goes.
        compute: device, dtype, batch size, memory.
        dense: the dense model's answers, for KL and top-1 agreement.

    Raises:
        As `run_segment`. NumberError also for a score or perplexity that is no number; nothing is written then.
    """
    subject = Subject(inputs.opened[0])
    passage = Passage(subject.model, Windows.load(inputs.windows), compute)
    about, doubts = _about(stage, subject, inputs), warn_of(subject.model, passage.windows)
    with _scored(stage, inputs, outputs, passage, dense) as (run, scores):
        result = stage_result(about, run, scores, passage, doubts)
        result.save(outputs.result_json, outputs.window_parquet)
    return result


def score_shard(
    stage: str,
    inputs: RunInputs,
    outputs: StageOutputs,
    compute: Compute,
    *,
    shard: Shard,
    dense: DenseAnswers | None = None,
) -> None:
    """Score some of the windows, for `gather_scores`; arguments and errors as for `score_stage`.

    The result is JSON: "run", the record of what was run, "device", and "scores", a list a column.
    """
    passage = Passage(inputs.opened[0], Windows.load(inputs.windows), compute).shard(shard)
    with _scored(stage, inputs, outputs, passage, dense) as (run, scores):
        content = {"run": run.content(), "device": compute.device.type, "scores": scores.content()}
        with atomic_file(outputs.result_json) as fresh:
            write_json(fresh, content)


def gather_scores(
    stage: str, inputs: RunInputs, outputs: StageOutputs, shards: Sequence[str | Path], batch_size: int
) -> StageResult:
    """The result of a stage from those of its shards: the bytes that `score_stage` writes.

    Args:
        stage, inputs, outputs: as for `score_stage`.
        shards: what `score_shard` wrote of each, in order. Where final hidden states are kept, each shard's lie beside,
            under the same name with the ending .safetensors.
        batch_size: windows in a batch.

    Raises:
        DataError: a shard is not what it should be, of other windows, or was run otherwise than the first.
    """
    subject, windows = Subject(inputs.opened[0]), Windows.load(inputs.windows)
    told = {file: _ShardScores.read(file) for file in shards}
    record = whole_record({file: {**of.run, "device": of.device} for file, of in told.items()}, windows, batch_size)
    run = replace(RunRecord.parse(record, next(iter(told))), dense=record.get("dense"))
    compute = Compute.named("cpu", run.dtype, batch_size)
    passage = Passage(subject.model, windows, replace(compute, device=torch.device(record["device"])))
    if outputs.final_hidden:
        hidden = [Path(file).with_suffix(".safetensors") for file in shards]
        gather_activations(hidden, windows, batch_size, outputs.final_hidden)
    scores = WindowScores.concatenate(of.scores for of in told.values())
    doubts = warn_of(subject.model, windows)
    result = stage_result(_about(stage, subject, inputs), run, scores, passage, doubts)
    result.save(outputs.result_json, outputs.window_parquet)
    return result


@dataclass(frozen=True)
class _ShardScores:
    """What `score_shard` wrote."""

    run: dict
    device: str
    scores: WindowScores

    @classmethod
    def read(cls, file: str | Path) -> _ShardScores:
        content = read_json(file, DataError)
        run, device, columns = (content.get(key) for key in ("run", "device", "scores"))
        if isinstance(run, dict) and isinstance(device, str) and isinstance(columns, dict):
            scores = WindowScores.parse(columns, run.get("windows", 0), taught="dense" in run)
            if scores is not None:
                return cls(run, device, scores)
        raise DataError("holds no scores of a shard", where=file, mend="Delete it and run the same again")


@contextmanager
def _scored(
    stage: str, inputs: RunInputs, outputs: StageOutputs, passage: Passage, dense: DenseAnswers | None
) -> Iterator[tuple[RunRecord, WindowScores]]:
    """Record and scores of a passage's windows; the journal beside the result goes once the block has saved them."""
    origin, tail = passage.origin(inputs.source), inputs.sources(inputs.opened[1])
    inputs.check_origin(origin.record)
    journal = Path(outputs.result_json).with_name(f".{Path(outputs.result_json).name}.scores")
    run, words = origin.record.after(tail, passage.compute), f"stage {stage}"
    with Scoring(passage, journal, run, words, dense=dense, final_hidden=outputs.final_hidden) as scoring:
        if not scoring.is_complete:
            run_layers(passage, origin, tail, scoring)
        scores = scoring.finish()
    yield scoring.record, scores
    scoring.forget()


def _about(stage: str, subject: Subject, inputs: RunInputs) -> dict[str, str | None]:
    """What a result is called, and the pruning that its parts are of."""
    identity = check_same_pruning([part.path for part in inputs.opened])
    return {"stage": stage, "label": subject.label(stage), KEY: identity}
