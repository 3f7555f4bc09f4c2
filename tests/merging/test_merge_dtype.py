"""A merge in another dtype than the base's: the bits of PEFT on a model that was loaded in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from merge_oracle import (
    LAYOUT,
    PROJECTIONS,
    edit_json,
    edit_tensors,
    peft_merged,
    random_adapter,
    read_result,
    save_base,
    zero_outside,
)
from transformers import AutoModelForCausalLM

from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging import merge as merge_module
from mistral_prune_lora.merging import stream as merge_stream
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.pruning.mistral_merge_adapter import main
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES
from mistral_prune_lora.storage.safetensors_file import read_header

LORA = {"r": 4, "lora_alpha": 7, "target_modules": PROJECTIONS}
DORA = {**LORA, "use_dora": True, "use_rslora": True}
MERGED, COPIED = "model.layers.4.mlp.up_proj.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models in a dtype, with bundles and two adapters, built once each."""
    built = {}

    def base(dtype: torch.dtype) -> Path:
        if dtype not in built:
            folder = built[dtype] = tmp_path_factory.mktemp("base")
            dense, _ = save_base(folder, dtype)
            for seed, (name, settings) in enumerate({"lora": LORA, "dora": DORA}.items()):
                random_adapter(folder / name, dense, settings, seed=seed)
                zero_outside(folder / name, LAYOUT.kept, folder / f"{name}-A")
        return built[dtype]

    return base


@pytest.fixture
def there(bases, tmp_path) -> Path:
    """A bfloat16 model with everything, to be changed."""
    return shutil.copytree(bases(torch.bfloat16), tmp_path / "there")


def part_of(name: str) -> str:
    return LAYOUT.part_of(int(name.split(".")[2])) if ".layers." in name else "A"


@pytest.mark.parametrize("adapters", [["lora"], ["dora"], ["dora", "lora"]], ids="+".join)
@pytest.mark.parametrize("wanted", COMPUTE_DTYPES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equals_peft_on_a_model_that_was_loaded_in_it(stored, wanted, adapters, bases, tmp_path):
    folder = bases(stored)
    paths = [folder / name for name in adapters]
    expected = peft_merged(folder / "dense", paths, COMPUTE_DTYPES[wanted])
    for part, base in (("A", folder / "A"), ("B", folder / "bundles/B"), ("C", folder / "bundles/C")):
        given = [folder / f"{name}-A" for name in adapters] if part == "A" else paths
        merge_adapters(base, given, tmp_path / part, settings=MergeSettings(output_dtype=wanted))
        got = read_result(tmp_path / part)
        assert got.keys() == {name for name in expected if part_of(name) == part}
        for name, tensor in got.items():
            assert tensor.dtype == COMPUTE_DTYPES[wanted]
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.parametrize("block", [5001, 1 << 17, 3 << 17])
@pytest.mark.parametrize(("stored", "wanted"), [(torch.bfloat16, "fp32"), (torch.float32, "fp16")], ids=str)
def test_blocks_of_rows_are_cast_and_merged_where_they_lie(stored, wanted, block, tmp_path, monkeypatch):
    """Blocks grow or shrink by the cast; sizes whose last block would be short, and odd ones."""
    monkeypatch.setattr(merge_stream, "_BLOCK_BYTES", block)
    dense, parts = save_base(tmp_path, stored, Layout(2, (1,)), hidden_size=513, intermediate_size=1345, head_dim=250)
    adapter = random_adapter(tmp_path / "adapter", dense, {**DORA, "r": 16}, layers=[0])
    expected = peft_merged(dense, [adapter], COMPUTE_DTYPES[wanted])
    merge_adapters(parts["A"], [adapter], tmp_path / "merged", settings=MergeSettings(output_dtype=wanted))
    for name, tensor in read_result(tmp_path / "merged").items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []], ids="+".join)
def test_the_configuration_and_the_record_tell_it(keys, there, tmp_path):
    config = json.loads((there / "A/config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (there / "A/config.json").write_text(json.dumps(config | dict.fromkeys(keys, "bfloat16")))
    words = ["--base_model", there / "A", "--adapter_path", there / "lora-A", "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in [*words, "--output_dtype", "fp16"]]) == 0
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told == config | dict.fromkeys(keys or ["torch_dtype"], "float16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float16
    assert json.loads((tmp_path / "out/merge.json").read_text())["output_dtype"] == "fp16"


def test_without_it_every_tensor_keeps_its_own(there, tmp_path):
    edit_tensors(
        there / "A/model.safetensors",
        lambda tensors: tensors.update({name: t.float() for name, t in tensors.items() if "norm" in name}),
    )
    before = {name: entry.dtype for name, entry in read_header(there / "A/model.safetensors").items()}
    merge_adapters(there / "A", [there / "lora-A"], tmp_path / "kept")
    assert {n: e.dtype for n, e in read_header(tmp_path / "kept/model.safetensors").items()} == before
    assert json.loads((tmp_path / "kept/merge.json").read_text())["output_dtype"] is None
    merge_adapters(there / "A", [there / "lora-A"], tmp_path / "cast", settings=MergeSettings(output_dtype="fp16"))
    assert {e.dtype for e in read_header(tmp_path / "cast/model.safetensors").values()} == {"F16"}


def test_a_full_model_out_of_skeleton_and_bundle_has_one_dtype(there, tmp_path):
    merge_adapters(there / "A", [there / "lora-A"], tmp_path / "A16", settings=MergeSettings(output_dtype="fp16"))
    merge_adapters(
        there / "bundles/B",
        [there / "lora-A"],
        tmp_path / "AB",
        settings=MergeSettings(skeleton=tmp_path / "A16", save_full_model=True, output_dtype="fp32"),
    )
    assert {e.dtype for e in read_header(tmp_path / "AB/model.safetensors").values()} == {"F32"}
    config = json.loads((tmp_path / "AB/config.json").read_text())
    assert "float32" in (config.get("dtype"), config.get("torch_dtype"))


def test_shards_and_space_are_counted_as_they_will_be_written(there, tmp_path, monkeypatch):
    largest = 100_000
    merge_adapters(
        there / "A",
        [there / "lora-A"],
        tmp_path / "out",
        settings=MergeSettings(output_dtype="fp32", max_shard_size=largest),
    )
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    sizes = [sum(entry.nbytes for entry in read_header(shard).values()) for shard in shards]
    whole = sum(entry.nbytes for entry in read_header(there / "A/model.safetensors").values())
    assert all(size <= largest for size in sizes)
    assert sum(sizes) == 2 * whole
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * whole
    usage = merge_module.shutil.disk_usage(tmp_path)._replace(free=merge_module._SMALL_FILES + int(1.5 * whole))
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage)
    merge_adapters(there / "A", [there / "lora-A"], tmp_path / "fits")
    with pytest.raises(PipelineError, match="are needed"):
        merge_adapters(
            there / "A", [there / "lora-A"], tmp_path / "too large", settings=MergeSettings(output_dtype="fp32")
        )


@pytest.mark.parametrize("name", [MERGED, COPIED])
def test_what_float16_cannot_hold_is_refused(name, there, tmp_path):
    edit_tensors(there / "A/model.safetensors", lambda tensors: tensors[name][-1, -1].fill_(1e5))
    with pytest.raises(CheckpointError, match=f"tensor {name} holds numbers beyond the range of F16"):
        merge_adapters(there / "A", [there / "lora-A"], tmp_path / "out", settings=MergeSettings(output_dtype="fp16"))
    assert not (tmp_path / "out").exists()
    merge_adapters(there / "A", [there / "lora-A"], tmp_path / "out", settings=MergeSettings(output_dtype="fp32"))


def test_numbers_that_are_no_floats_are_copied_and_quantised_weights_are_refused(there, tmp_path):
    steps = torch.arange(7)
    edit_tensors(there / "A/model.safetensors", lambda tensors: tensors.update(steps=steps, on=torch.tensor(True)))
    merge_adapters(there / "A", [there / "lora-A"], tmp_path / "out", settings=MergeSettings(output_dtype="fp16"))
    got = read_result(tmp_path / "out")
    assert torch.equal(got["steps"], steps) and got["on"].dtype == torch.bool
    for strange in (torch.ones(3).to(torch.float8_e4m3fn), torch.ones(4, 4, dtype=torch.uint8)):
        edit_tensors(there / "A/model.safetensors", lambda tensors, s=strange: tensors.update(strange=s))
        with pytest.raises(CheckpointError, match=r"strange is stored as .*: quantised weights are not cast"):
            merge_adapters(
                there / "A", [there / "lora-A"], tmp_path / "refused", settings=MergeSettings(output_dtype="fp16")
            )


def test_an_unknown_dtype_is_refused(there, capsys):
    edit_json(there / "A/config.json", torch_dtype="bfloat16")
    with pytest.raises(SystemExit):
        main(["--base_model", "A", "--adapter_path", "lora", "--output_dir", "out", "--output_dtype", "int8"])
    assert "--output_dtype" in capsys.readouterr().err
