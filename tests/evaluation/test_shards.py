"""Windows split over several jobs: what is gathered has every byte of what a single job writes."""

import json
from pathlib import Path

import pytest
import torch
from cut_model import cut, random_windows, save_dense

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.distillation.prefix import prefix_states
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.errors import DataError, NumberError
from mistral_prune_lora.evaluation.gathering import gather_scores
from mistral_prune_lora.evaluation.job_inputs import RunInputs, StageOutputs
from mistral_prune_lora.evaluation.jobs import run_segment, score_shard, score_stage
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage.activations import ActivationWriter
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.shards import Shard, gather_activations

LAYOUT = Layout(8, (3, 4), (5, 6))
WINDOWS = random_windows(7, 24)  # four batches, the last of one window
COMPUTE = Compute.named("cpu", "bf16", 2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A dense model, A and B."""
    folder = tmp_path_factory.mktemp("parts")
    dense = save_dense(folder / "dense")
    a, bundles = cut(dense, LAYOUT, folder)
    WINDOWS.save(folder / "windows")
    return dense, a, bundles["B"]


def everything(parts, folder: Path, of: int) -> dict[str, bytes]:
    """Every kind of run that may be split, each in so many shards and gathered; of 1, as a single job. The files."""
    dense, a, b = parts
    folder.mkdir()
    file = dense.parent / "windows"

    def states(name, run):
        if of == 1:
            run(folder / name, None)
            return
        shards = [Shard(number, of) for number in range(1, of + 1)]
        for shard in reversed(shards):
            run(folder / f"{name}.{shard.number}", shard)
        gather_activations([folder / f"{name}.{s.number}" for s in shards], WINDOWS, 2, folder / name)

    def score(stage, inputs, name, teacher=None, keeps=False):
        def outputs(stem):
            kept = folder / f"{stem}.safetensors" if keeps else None
            return StageOutputs(folder / f"{stem}.json", folder / f"{stem}.parquet", kept)

        if of == 1:
            score_stage(stage, inputs, outputs(name), COMPUTE, dense=teacher)
            return
        stems = [f"{name}.{number}" for number in range(1, of + 1)]
        for number, stem in enumerate(stems, 1):
            score_shard(stage, inputs, outputs(stem), COMPUTE, shard=Shard(number, of), dense=teacher)
        gather_scores(stage, inputs, outputs(name), [folder / f"{stem}.json" for stem in stems], 2)

    states("a", lambda out, shard: run_segment(RunInputs(a, a, (0, 1, 2), file), out, COMPUTE, shard=shard))
    of_b = RunInputs(a, b, (3, 4), file, folder / "a")
    states("ab", lambda out, shard: run_segment(of_b, out, COMPUTE, shard=shard))
    score("FULL", RunInputs(dense, dense, range(8), file), "dense", keeps=True)
    teacher = DenseAnswers(open_checkpoint(dense), folder / "dense.safetensors")
    score("AB", RunInputs(a, a, (7,), file, folder / "ab"), "AB", teacher)
    states("teacher", lambda out, shard: teacher_states(dense, WINDOWS, out, compute=COMPUTE, shard=shard))
    student = Student(a, (b,))
    states("p3", lambda out, shard: prefix_states(student, 3, WINDOWS, out, compute=COMPUTE, shard=shard))
    further = {"compute": COMPUTE, "start": folder / "p3"}
    states("p5", lambda out, shard: prefix_states(student, 5, WINDOWS, out, **further, shard=shard))
    whole = ["a", "ab", "dense.json", "dense.parquet", "dense.safetensors", "AB.json", "AB.parquet", "teacher"]
    return {name: (folder / name).read_bytes() for name in [*whole, "p3", "p5"]}


def test_what_is_gathered_has_every_byte_of_a_single_job(parts, tmp_path):
    single = everything(parts, tmp_path / "1", 1)
    for of in (2, 3, 4):
        found = everything(parts, tmp_path / str(of), of)
        assert [name for name in single if found[name] != single[name]] == []


def segment_shards(parts, folder: Path, compute=(COMPUTE, COMPUTE)) -> list[Path]:
    _, a, _ = parts
    inputs = RunInputs(a, a, (0,), a.parent / "windows")
    files = [folder / f"{number}" for number in (1, 2)]
    for number, (file, how) in enumerate(zip(files, compute, strict=True), 1):
        run_segment(inputs, file, how, shard=Shard(number, 2))
    return files


def test_shards_of_other_windows_or_run_otherwise_are_refused(parts, tmp_path, monkeypatch):
    first, second = segment_shards(parts, tmp_path)
    for files in ([second, first], [first, first], [first]):
        with pytest.raises(DataError, match=r"this shard was of other windows \(ids_sha256 differs\)"):
            gather_activations(files, WINDOWS, 2, tmp_path / "whole")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    _, other = segment_shards(parts, tmp_path / "other")
    with pytest.raises(DataError, match=r"this shard was run otherwise than the first one \(steps differs\)"):
        gather_activations([first, other], WINDOWS, 2, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_gathering_that_is_killed_goes_on(parts, tmp_path, monkeypatch):
    files, write, calls = segment_shards(parts, tmp_path), ActivationWriter.write, []

    def killed(self, batch, hidden):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, batch, hidden)

    monkeypatch.setattr(ActivationWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        gather_activations(files, WINDOWS, 2, tmp_path / "whole")
    gather_activations(files, WINDOWS, 2, tmp_path / "whole")
    assert calls == [0, 1, 2, 2, 3]
    monkeypatch.undo()
    gather_activations(files, WINDOWS, 2, tmp_path / "again")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_shard_has_whole_batches_and_is_refused_where_there_are_too_few():
    assert [Shard(number, 3).span(7, 2) for number in (1, 2, 3)] == [(0, 2), (2, 4), (4, 7)]
    assert Shard.named("2-of-3") == Shard(2, 3) and Shard.named(None) is None
    with pytest.raises(DataError, match=r"7 windows make 4 batches of 2, too few for 5 shards"):
        Shard(1, 5).span(7, 2)


def test_a_window_that_is_no_number_goes_by_its_number_among_all(parts, tmp_path, monkeypatch):
    _, a, _ = parts
    forward = Backbone.__call__
    monkeypatch.setattr(Backbone, "__call__", lambda self, *given: forward(self, *given) * float("nan"))
    with pytest.raises(NumberError, match="the hidden states of window 4 become NaN"):
        run_segment(RunInputs(a, a, (0,), a.parent / "windows"), tmp_path / "x", COMPUTE, shard=Shard(2, 2))


def test_a_damaged_shard_of_scores_is_refused(parts, tmp_path):
    _, a, _ = parts
    inputs = RunInputs(a, a, (0,), a.parent / "windows")
    file = tmp_path / "1.json"
    score_shard("A", inputs, StageOutputs(file, None), COMPUTE, shard=Shard(1, 1))
    content = json.loads(file.read_text())
    content["scores"]["nll"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds no scores of a shard"):
        gather_scores("A", inputs, StageOutputs(tmp_path / "A.json", tmp_path / "A.parquet"), [file], 2)
