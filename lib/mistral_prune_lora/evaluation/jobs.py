"""The workflow's jobs of an evaluation: a segment of layers, and a stage's tail with its score.

Boundary activations are files between them, so that every run of layers that stages share is computed once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_prune_lora.evaluation.job_inputs import RunInputs, StageOutputs, about_result
from mistral_prune_lora.evaluation.result import StageResult, stage_result
from mistral_prune_lora.evaluation.scoring import DenseAnswers, Scoring
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.results.statistics import WindowScores
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.transaction import atomic_file
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.record import RunRecord
from mistral_prune_lora.streaming.run import run_layers, run_to_file
from mistral_prune_lora.streaming.shards import Shard
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows


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
    about, doubts = about_result(stage, subject, inputs), warn_of(subject.model, passage.windows)
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
    """Score some of the windows, for `gathering.gather_scores`; arguments and errors as for `score_stage`.

    The result is JSON: "run", the record of what was run, "device", and "scores", a list a column.
    """
    passage = Passage(inputs.opened[0], Windows.load(inputs.windows), compute).shard(shard)
    with _scored(stage, inputs, outputs, passage, dense) as (run, scores):
        content = {"run": run.content(), "device": compute.device.type, "scores": scores.content()}
        with atomic_file(outputs.result_json) as fresh:
            write_json(fresh, content)


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
