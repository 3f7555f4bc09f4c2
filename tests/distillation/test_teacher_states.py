"""The teacher's states, streamed: the bits of the whole model, whatever the memory, however often it was stopped."""

import json

import pytest
import torch
from cut_model import random_windows, save_dense
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.streaming import run
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.record import config_sha256

TIGHT = {torch.float32: 620_000, torch.bfloat16: 380_000}  # bytes: three of eight layers, or four


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


@torch.inference_mode()
def plain_states(dense, windows, dtype, batch_size):
    """The last hidden state that transformers gives of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    return torch.cat([model.model(ids).last_hidden_state for ids in windows.ids.long().split(batch_size)])


def groups_of(monkeypatch):
    """Lists what is resident together, of every run."""
    seen, original = [], run.resident_groups

    def watching(*args):
        groups = original(*args)
        seen.append([len(group) for group in groups])
        return groups

    monkeypatch.setattr(run, "resident_groups", watching)
    return seen


@pytest.mark.parametrize("config", [{}, {"family": "qwen2", "tie_word_embeddings": True}])
@pytest.mark.parametrize(("dtype", "batch_size"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 2)])
def test_they_are_those_of_the_whole_model(tmp_path, monkeypatch, config, dtype, batch_size):
    dense, windows = save_dense(tmp_path / "dense", **config), random_windows(5, 16)
    seen, files = groups_of(monkeypatch), []
    for name, memory in (("ample", None), ("tight", TIGHT[dtype])):
        teacher_states(dense, windows, tmp_path / name, compute=Compute(torch.device("cpu"), dtype, batch_size, memory))
        files.append((tmp_path / name).read_bytes())
    assert seen[0] == [8] and max(seen[1]) <= 4 and len(seen) == 2
    assert torch.equal(load_file(tmp_path / "ample")["hidden_states"], plain_states(dense, windows, dtype, batch_size))
    assert files[0] == files[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ample", "dense", "tight"]


def test_they_say_which_teacher_and_which_ids_they_belong_to(tmp_path, dense):
    windows = random_windows(3, 16)
    teacher_states(dense, windows, tmp_path / "states", compute=Compute.named("cpu", "fp32", 2))
    with safe_open(tmp_path / "states", "pt") as file:
        record = json.loads(file.metadata()["run"])
    assert record == {
        "ids_sha256": windows.identity.ids_sha256,
        "teacher": {"model.safetensors": file_sha256(dense / "model.safetensors")},
        "config_sha256": config_sha256(open_checkpoint(dense)),
        "batch_size": 2,
        "shape": [3, 16],
    }


@pytest.mark.parametrize(("memory", "stop", "again"), [(None, 1, [1, 2]), (TIGHT[torch.float32], 4, [1, 2, 0, 1, 2])])
def test_a_killed_run_goes_on_where_it_was_stopped(tmp_path, dense, monkeypatch, memory, stop, again):
    """With all layers in memory, and in three groups, stopped in the second; three batches in each."""
    windows, write, written = random_windows(5, 16), run.ActivationWriter.write, []

    def make(name):
        teacher_states(dense, windows, tmp_path / name, compute=Compute.named("cpu", "fp32", 2, memory))

    def stopping(writer, batch, hidden):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(batch)
        write(writer, batch, hidden)

    make("undisturbed")
    monkeypatch.setattr(run.ActivationWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        make("states")
    assert not (tmp_path / "states").exists()
    stop, written[:] = None, []
    make("states")
    assert written == again
    assert (tmp_path / "states").read_bytes() == (tmp_path / "undisturbed").read_bytes()


def test_a_killed_run_of_other_batches_is_not_gone_on_with(tmp_path, dense, monkeypatch):
    windows, write = random_windows(5, 16), run.ActivationWriter.write

    def stopping(writer, batch, hidden):
        if batch == 4:
            raise KeyboardInterrupt
        write(writer, batch, hidden)

    monkeypatch.setattr(run.ActivationWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        teacher_states(dense, windows, tmp_path / "states", compute=Compute.named("cpu", "fp32"))
    teacher_states(dense, windows, tmp_path / "states", compute=Compute.named("cpu", "fp32", 2))
    expected = plain_states(dense, windows, torch.float32, 2)
    assert torch.equal(load_file(tmp_path / "states")["hidden_states"], expected)


def test_a_teacher_that_overflows_is_refused(tmp_path, dense):
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match="holds NaN or infinity"):
        teacher_states(dense, random_windows(2, 16), tmp_path / "states", compute=Compute.named("cpu", "fp16"))
    assert not (tmp_path / "states").exists()


def test_a_teacher_that_is_too_large_or_incomplete_writes_nothing(tmp_path, dense):
    windows = random_windows(2, 16)
    with pytest.raises(PipelineError, match="do not fit into 1KB"):
        teacher_states(dense, windows, tmp_path / "states", compute=Compute.named("cpu", "fp32", max_memory=1000))
    (dense / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        teacher_states(dense, windows, tmp_path / "states", compute=Compute.named("cpu", "fp32"))
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
