"""A stage's result out of those of its shards. Imports no model's classes: nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.evaluation.job_inputs import RunInputs, StageOutputs, about_result
from mistral_prune_lora.evaluation.result import StageResult, stage_result
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.results.statistics import WindowScores
from mistral_prune_lora.storage.json_file import read_json
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.record import RunRecord
from mistral_prune_lora.streaming.shards import gather_activations, whole_record
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows


def gather_scores(
    stage: str, inputs: RunInputs, outputs: StageOutputs, shards: Sequence[str | Path], batch_size: int
) -> StageResult:
    """The result of a stage from those of its shards: the bytes that `jobs.score_stage` writes.

    Args:
        stage, inputs, outputs: as for `jobs.score_stage`.
        shards: what `jobs.score_shard` wrote of each, in order. Where final hidden states are kept, each shard's lie
            beside, under the same name with the ending .safetensors.
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
    result = stage_result(about_result(stage, subject, inputs), run, scores, passage, doubts)
    result.save(outputs.result_json, outputs.window_parquet)
    return result


@dataclass(frozen=True)
class _ShardScores:
    """What `jobs.score_shard` wrote."""

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
