"""The record of a run: equal for what computes the same bits, another one for everything that may change one."""

import json
import shutil

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from merge_oracle import edit_json
from safetensors.torch import load_file, save_file

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.record import RunRecord, parameters, tensors_sha256

COMPUTE = Compute(torch.device("cpu"), torch.float32, 2)
WINDOWS = random_windows(3, 8)


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


def record(folder, layers=range(8), compute=COMPUTE, windows=WINDOWS):
    model = open_checkpoint(folder)
    start = RunRecord.start(model, windows, compute.dtype)
    return start.after([LayerSource(i, model) for i in layers], compute).with_head(model)


def test_it_counts_what_transformers_counts(dense):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense)
    assert record(dense).parameters == sum(p.numel() for p in model.parameters())
    assert parameters(open_checkpoint(dense).layer(0).values()) == sum(
        p.numel() for p in model.model.layers[0].parameters()
    )


def test_the_same_layers_in_another_file_are_the_same_run(dense, tmp_path):
    a, bundles = cut(dense, Layout(8, (3, 4), (5, 6)), tmp_path)
    whole, holders = record(dense), {"A": open_checkpoint(a), **{p: open_checkpoint(b) for p, b in bundles.items()}}
    layout, found = holders["A"].layout, RunRecord.start(holders["A"], WINDOWS, torch.float32)
    for layer in range(8):
        found = found.after([LayerSource(layer, holders[layout.part_of(layer)])], COMPUTE)
    assert found.with_head(holders["A"]) == whole
    assert len(whole.steps) == 1 and whole.steps[0]["layers"] == list(range(8))


def test_whatever_changes_a_bit_changes_it(dense, tmp_path):
    whole = record(dense)
    assert record(dense).sha256 == whole.sha256
    others = {
        "layers": record(dense, layers=range(7)),
        "dtype": record(dense, compute=Compute(COMPUTE.device, torch.bfloat16, 2)),
        "batch size": record(dense, compute=Compute(COMPUTE.device, torch.float32, 3)),
        "windows": record(dense, windows=random_windows(3, 8, seed=9)),
    }
    changed = shutil.copytree(dense, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    others["a weight"] = record(changed)
    other = shutil.copytree(dense, tmp_path / "other")
    edit_json(other / "config.json", rms_norm_eps=0.5)
    others["the configuration"] = record(other)
    assert len({whole.sha256, *(found.sha256 for found in others.values())}) == 1 + len(others)
    edit_json(dense / "config.json", transformers_version="0")  # says nothing about arithmetic
    assert record(dense).sha256 == whole.sha256


def test_it_comes_back_from_json(dense):
    whole = record(dense)
    content = json.loads(json.dumps(whole.content()))
    assert RunRecord.parse(content, "a file") == whole and "dense" not in content
    for key in content:
        with pytest.raises(DataError, match=r"does not say what was run \(in a file\)"):
            RunRecord.parse({**content, key: None}, "a file")


def test_only_a_run_of_the_same_windows_dtype_and_model_is_gone_on_from(dense):
    model, whole = open_checkpoint(dense), record(dense)
    whole.check_continues(RunRecord.start(model, WINDOWS, torch.float32), "a file")
    with pytest.raises(DataError, match="was made with another dtype"):
        whole.check_continues(RunRecord.start(model, WINDOWS, torch.bfloat16), "a file")
    with pytest.raises(DataError, match="was made with another ids_sha256"):
        whole.check_continues(RunRecord.start(model, random_windows(3, 8, seed=9), torch.float32), "a file")


def test_a_digest_is_of_the_bytes_that_are_there_now(dense):
    before = tensors_sha256(open_checkpoint(dense).layer(0))
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert tensors_sha256(open_checkpoint(dense).layer(0)) != before
