"""The evaluation in jobs of a workflow, files between them: the same bits as all of it in one process."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from evaluation_jobs import score_job, segment_job

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.layout.segments import segment_tree, shared_segments, stage_run
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import Compute

LAYOUT = Layout(8, (3, 4), (5, 6))
SETTINGS = {"dtype": "bf16", "device": "cpu", "batch_size": 2}


@pytest.fixture
def jobs(tmp_path):
    """A function that runs every job of the three stages with the dense model as teacher; gives the results."""
    dense = save_dense(tmp_path / "dense")
    a, bundles = cut(dense, LAYOUT, tmp_path)
    random_windows(5, 24).save(tmp_path / "windows.safetensors")
    given = {"windows": tmp_path / "windows.safetensors", **SETTINGS}
    holders, tree = {"A": a, **bundles}, segment_tree(LAYOUT)

    def run(folder):
        def file(name):
            return None if name is None else folder / f"{name}.safetensors"

        teacher = {"teacher_hidden": folder / "dense.safetensors", "dense_dir": dense}
        whole = {"stage": "FULL", "model_dir": dense, "weights_dir": dense, "layers": range(8), "source": None}
        outputs = {"result_json": folder / "dense.json", "window_parquet": folder / "dense.parquet"}
        results = {"dense": score_job(**whole, **given, **outputs, final_hidden=teacher["teacher_hidden"])}
        for s in shared_segments(tree):
            ends = {"source": file(s.parent), "output": file(s.name)}
            segment_job(model_dir=a, weights_dir=holders[s.part], layers=s.layers, **ends, **given)
        for stage in STAGES:
            start, tail = stage_run(tree, stage)
            results[stage] = score_job(
                stage=stage,
                model_dir=a,
                weights_dir=holders[tail.part],
                layers=tail.layers,
                source=file(start),
                result_json=folder / f"{stage}.json",
                window_parquet=folder / f"{stage}.parquet",
                **teacher,
                **given,
            )
        return results

    return run


def test_jobs_give_the_bits_of_one_process(tmp_path, jobs):
    results = jobs(tmp_path / "jobs")
    windows, compute = random_windows(5, 24), Compute(torch.device("cpu"), torch.bfloat16, 2)
    subject = Subject.open(tmp_path / "A", {part: tmp_path / "bundles" / part for part in "BC"})
    teacher = DenseAnswers(Subject.open(tmp_path / "dense").model, tmp_path / "jobs/dense.safetensors")
    together = evaluate_stages(subject, STAGES, windows, compute, work_dir=tmp_path / "work", dense=teacher)
    for stage, expected in zip(STAGES, together, strict=True):
        found = results[stage]
        for column in ("nll", "correct", "kl", "agree"):
            np.testing.assert_array_equal(getattr(found.scores, column), getattr(expected.scores, column))
        assert found.record == expected.record
        assert json.loads((tmp_path / f"jobs/{stage}.json").read_text()) == found.record
        table = pd.read_parquet(tmp_path / f"jobs/{stage}.parquet")
        assert list(table.columns) == ["window", "tokens", "nll", "correct", "kl", "agree"]
        assert table["nll"].tolist() == expected.scores.nll.tolist() and table["tokens"].tolist() == [23] * 5
    assert (
        results["FULL"].record["kl_dense"] == 0
        and results["FULL"].record["mean_nll"] == (results["dense"].record["mean_nll"])
    )
    assert not list((tmp_path / "jobs").glob(".*")), "journals are gone once their results are there"


def test_interrupted_jobs_repeat_no_pass(tmp_path, jobs, monkeypatch):
    calls, forward, limit = [], Backbone.__call__, [None]

    def call(self, *given):
        if len(calls) == limit[0]:
            raise KeyboardInterrupt
        calls.append(1)
        return forward(self, *given)

    monkeypatch.setattr(Backbone, "__call__", call)
    expected = jobs(tmp_path / "undisturbed")
    in_all = len(calls)
    # Dense scores, then layers 0-2: three batches each; the interrupted job is the second one.
    calls.clear()
    limit[0] = 5
    with pytest.raises(KeyboardInterrupt):
        jobs(tmp_path / "jobs")
    assert len(list((tmp_path / "jobs").glob(".*.journal"))) == 1
    limit[0] = None
    results = jobs(tmp_path / "jobs")
    # Leaving out a finished job is up to the workflow: here the dense one's three batches ran twice.
    assert len(calls) == in_all + 3
    assert {s: r.record for s, r in results.items()} == {s: r.record for s, r in expected.items()}


def test_answers_of_a_teacher_to_other_windows_are_refused(tmp_path, jobs):
    jobs(tmp_path / "jobs")
    random_windows(5, 24, seed=7).save(tmp_path / "windows.safetensors")
    with pytest.raises(DataError, match="was made with another ids_sha256"):
        score_job(
            stage="FULL",
            model_dir=tmp_path / "dense",
            weights_dir=tmp_path / "dense",
            layers=range(8),
            source=None,
            windows=tmp_path / "windows.safetensors",
            result_json=tmp_path / "r.json",
            window_parquet=tmp_path / "r.parquet",
            teacher_hidden=tmp_path / "jobs/dense.safetensors",
            dense_dir=tmp_path / "dense",
            **SETTINGS,
        )
    assert not (tmp_path / "r.json").exists()
