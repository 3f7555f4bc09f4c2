"""What cannot be merged is refused with one clear line, before anything is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from merge_oracle import LAYOUT, edit_json, edit_tensors, random_adapter, save_base
from merge_spoilers import LORA, SPOILT, WEIGHTS

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.provenance import package_line
from mistral_prune_lora.pruning.mistral_merge_adapter import main


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    dense, _ = save_base(folder, torch.bfloat16)
    random_adapter(folder / "adapter", dense, LORA, layers=LAYOUT.kept)
    random_adapter(folder / "dora", dense, {**LORA, "use_dora": True})
    return folder


@pytest.fixture
def there(originals, tmp_path) -> Path:
    """A base, its bundles and an adapter, to be spoilt."""
    shutil.copytree(originals, tmp_path / "there")
    edit_json(tmp_path / "there/adapter/adapter_config.json", base_model_name_or_path=None)
    return tmp_path / "there"


def refused(capsys, output: Path, words: list, what: str) -> str:
    """Run the command; it must fail with one line and write nothing. Returns the line."""
    before = sorted(output.parent.iterdir())
    assert main([str(word) for word in words]) == 1
    out, err = capsys.readouterr()
    who, *lines = [line for line in err.splitlines() if "Loading weights" not in line and "Writing model" not in line]
    assert who == package_line() and len(lines) == 1
    assert lines[0].startswith("error: ")
    assert out == ""
    assert sorted(output.parent.iterdir()) == before
    assert re.search(what, lines[0]), lines[0]
    return lines[0]


@pytest.mark.parametrize("case", SPOILT)
def test_is_refused(case, there, tmp_path, capsys):
    spoil, what = SPOILT[case]
    spoil(there)
    capsys.readouterr()
    output = tmp_path / "out" / "A_merged"
    output.parent.mkdir()
    with pytest.raises(PipelineError, match=what):
        merge_adapters(there / "A", [there / "adapter"], output)
    refused(capsys, output, arguments(there, output), what)


def arguments(there: Path, output: Path, base: str = "A") -> list:
    return ["--base_model", there / base, "--adapter_path", there / "adapter", "--output_dir", output]


def test_flags_that_contradict_each_other(there, tmp_path, capsys):
    words = [*arguments(there, tmp_path / "out"), "--save_bundle_only", "--save_full_model"]
    refused(capsys, tmp_path / "out", words, "exclude each other")


def test_a_gpu_that_is_not_there(there, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = refused(capsys, tmp_path / "out", [*arguments(there, tmp_path / "out"), "--device", "cuda:0"], "cuda:0")
    assert "--device cpu" in line


def test_a_device_that_is_none(there, tmp_path, capsys):
    refused(capsys, tmp_path / "out", [*arguments(there, tmp_path / "out"), "--device", "quantum"], "not a device")


def test_no_adapter_at_all(there, tmp_path):
    with pytest.raises(PipelineError, match="no adapter is given"):
        merge_adapters(there / "A", [], tmp_path / "out")


def test_a_bundle_of_another_pruning(there, tmp_path, capsys):
    save_base(there / "other", torch.bfloat16, Layout(5, (4,), (3,)))
    capsys.readouterr()
    words = [*arguments(there, tmp_path / "out", "other/bundles/B"), "--skeleton", there / "A"]
    refused(capsys, tmp_path / "out", words, r"layers \[4\] of the bundle are not dropped layers")


def test_a_full_model_of_a_bundle_needs_a_skeleton(there, tmp_path, capsys):
    words = [*arguments(there, tmp_path / "out", "bundles/B"), "--save_full_model"]
    line = refused(capsys, tmp_path / "out", words, "is not the directory of an A model")
    assert "--skeleton" in line


def test_a_bundle_of_another_geometry_is_not_restored(there, tmp_path, capsys):
    dense, _ = save_base(there / "other", torch.bfloat16, hidden_size=32)
    shutil.rmtree(there / "adapter")
    random_adapter(there / "adapter", dense, LORA)
    capsys.readouterr()
    words = [*arguments(there, tmp_path / "out", "other/bundles/B"), "--save_full_model", "--skeleton", there / "A"]
    refused(
        capsys,
        tmp_path / "out",
        words,
        r"input_layernorm.weight has the shape \(32,\), and by config.json it is \(64,\)",
    )


def test_tied_embeddings(tmp_path, capsys):
    dense, _ = save_base(tmp_path, torch.bfloat16, tie_word_embeddings=True)
    adapter = random_adapter(tmp_path / "adapter", dense, {**LORA, "target_modules": ["q_proj"]})
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "lm_head"])
    change = {f"base_model.model.lm_head.lora_{x}.weight": torch.ones(s) for x, s in (("A", (4, 64)), ("B", (96, 4)))}
    edit_tensors(adapter / WEIGHTS, lambda tensors: tensors.update(change))
    capsys.readouterr()
    refused(capsys, tmp_path / "out", arguments(tmp_path, tmp_path / "out"), "tie|which this model does not have")


def test_a_base_that_is_gone_or_dense_is_no_reason_to_refuse(there, tmp_path):
    for i, named in enumerate(["/nowhere/A", "mistralai/Mistral-7B-v0.1", str(there / "dense"), str(there / "A")]):
        edit_json(there / "adapter/adapter_config.json", base_model_name_or_path=named)
        for part in ("A", "bundles/B"):
            merge_adapters(there / part, [there / "adapter"], tmp_path / f"{part[-1]}{i}")


def test_unspoilt_it_is_merged(there):
    assert merge_adapters(there / "A", [there / "adapter"], there / "out").merged == 14
