"""The workflow's jobs of an evaluation with everything by one name each, as a rule's script is given it."""

from __future__ import annotations

from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.evaluation.job_inputs import RunInputs, StageOutputs
from mistral_prune_lora.evaluation.jobs import run_segment, score_stage
from mistral_prune_lora.evaluation.result import StageResult
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.streaming.compute import Compute

INPUTS = ("model_dir", "weights_dir", "layers", "windows", "source")
COMPUTE = ("device", "dtype", "batch_size", "max_memory")


def segment_job(output: Path, **given) -> None:
    """Run a segment; the rest by the names of RunInputs' fields and of Compute.named's arguments."""
    run_segment(_inputs(given), output, _compute(given))


def score_job(
    stage: str, *, result_json: Path, window_parquet: Path, final_hidden=None, dense_dir=None, teacher_hidden=None,
    **given,
) -> StageResult:  # fmt: skip
    """Score a stage; arguments as for `segment_job`."""
    dense = DenseAnswers(open_checkpoint(dense_dir), teacher_hidden) if teacher_hidden else None
    outputs = StageOutputs(result_json, window_parquet, final_hidden)
    return score_stage(stage, _inputs(given), outputs, _compute(given), dense=dense)


def _inputs(given: dict) -> RunInputs:
    assert set(given) <= {*INPUTS, *COMPUTE}
    return RunInputs(**{name: value for name, value in given.items() if name in INPUTS})


def _compute(given: dict) -> Compute:
    return Compute.named(**{"device": "cpu", **{name: value for name, value in given.items() if name in COMPUTE}})
