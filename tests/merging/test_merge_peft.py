"""The merge against PEFT's own merge_and_unload: not one bit may differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_oracle import (
    LAYOUT,
    LORA_OF_ALL,
    peft_merged,
    random_adapter,
    read_result,
    save_base,
    zero_outside,
)
from safetensors.torch import load_file, save_file

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging import stream as merge_stream
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.pruning.mistral_merge_adapter import main

LORA = LORA_OF_ALL
KINDS = {
    "lora": LORA,
    "odd scaling": {**LORA, "r": 3, "lora_alpha": 7},
    "rslora": {**LORA, "r": 3, "use_rslora": True},
    "dora": {**LORA, "use_dora": True},
    "rsdora": {**LORA, "use_dora": True, "use_rslora": True, "r": 5},
    "patterns": {
        **LORA,
        "rank_pattern": {"q_proj": 2, r"layers\.[0-2]\.mlp\.up_proj": 7, "^model.layers.4.self_attn.v_proj": 1},
        "alpha_pattern": {"down_proj": 3, r"model\.layers\.(1|3)\..*_proj": 11, "proj": 1, "q_proj": 5},
    },
    "rsdora patterns": {**LORA, "use_dora": True, "use_rslora": True, "rank_pattern": {"self_attn.k_proj": 9}},
    "some layers": {**LORA, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2, 3, 4]},
    "layers pattern": {
        **LORA,
        "target_modules": ["o_proj"],
        "layers_to_transform": [1, 3, 4],
        "layers_pattern": "layers",
    },
    "regular expression": {**LORA, "target_modules": r".*\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.gate_proj)"},
    "excluded": {**LORA, "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    "all linear": {**LORA, "target_modules": "all-linear"},
    "head": {**LORA, "target_modules": ["q_proj", "lm_head"]},
    "full names": {**LORA, "target_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(5)]},
    "fan in fan out": {**LORA, "fan_in_fan_out": True},
    "another start": {**LORA, "init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models and bundles in a dtype, built once each."""
    built = {}

    def base(dtype: torch.dtype) -> tuple[Path, dict[str, Path]]:
        if dtype not in built:
            built[dtype] = save_base(tmp_path_factory.mktemp("base"), dtype)
        return built[dtype]

    return base


def check(bases, folder: Path, dtype, adapters: list[Path], run=merge_adapters) -> None:
    """Merge into A, B and C and compare with PEFT on the whole model."""
    dense, parts = bases(dtype)
    expected = peft_merged(dense, adapters, dtype)
    for part in "ABC":
        given = adapters
        if part == "A":  # an adapter that changes layers which A runs without was not trained for A
            given = [zero_outside(a, LAYOUT.kept, folder / f"for-A-{i}") for i, a in enumerate(adapters)]
        run(parts[part], given, folder / part)
        got = read_result(folder / part)
        names = {n for n in expected if part_of(n) == part}
        assert got.keys() == names
        for name in names:
            assert got[name].dtype == dtype
            assert torch.equal(got[name].view(torch.uint8), expected[name].view(torch.uint8)), name


def part_of(name: str) -> str:
    return LAYOUT.part_of(int(name.split(".")[2])) if ".layers." in name else "A"


@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft_bit_for_bit(kind, bases, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", bases(torch.bfloat16)[0], KINDS[kind])
    check(bases, tmp_path, torch.bfloat16, [adapter])


@pytest.mark.parametrize("kind", ["odd scaling", "rsdora"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_peft_for_every_dtype(dtype, adapter_dtype, kind, bases, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", bases(dtype)[0], KINDS[kind], dtype=adapter_dtype)
    check(bases, tmp_path, dtype, [adapter])


@pytest.mark.parametrize("kinds", [("lora", "rslora"), ("dora", "odd scaling"), ("rslora", "dora"), ("dora", "dora")])
def test_two_adapters_are_merged_in_turn(kinds, bases, tmp_path):
    dense = bases(torch.bfloat16)[0]
    adapters = [random_adapter(tmp_path / f"adapter{i}", dense, KINDS[k], seed=i) for i, k in enumerate(kinds)]
    check(bases, tmp_path, torch.bfloat16, adapters)


def test_the_command_gives_the_same_bits(bases, tmp_path):
    adapters = [random_adapter(tmp_path / f"adapter{i}", bases(torch.bfloat16)[0], LORA, seed=i) for i in range(2)]

    def run(base, adapters, output):
        argv = ["--base_model", base, "--adapter_paths", *adapters, "--output_dir", output, "--device", "cpu"]
        assert main([str(word) for word in argv]) == 0

    check(bases, tmp_path, torch.bfloat16, adapters, run)


def test_what_is_out_of_scope_changes_nothing(bases, tmp_path):
    """Zeroed factors would still change a weight under DoRA: its magnitude differs from the weight's norm."""
    dense, parts = bases(torch.bfloat16)
    adapter = random_adapter(tmp_path / "adapter", dense, KINDS["dora"])
    report = merge_adapters(
        parts["B"], [adapter], tmp_path / "B", settings=MergeSettings(save_full_model=True, skeleton=parts["A"])
    )
    got, before = read_result(tmp_path / "B"), read_result(dense)
    expected = peft_merged(dense, [adapter], torch.bfloat16)
    assert {int(n.split(".")[2]) for n in got if ".layers." in n} == {*LAYOUT.kept, *LAYOUT.b}
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name] if part_of(name) == "B" else before[name]), name
    assert report.merged == 2 * 7
    assert report.out_of_scope == 3 * 7 * 3


def test_the_dense_model_takes_an_adapter_too(bases, tmp_path):
    dense, _ = bases(torch.bfloat16)
    adapter = random_adapter(tmp_path / "adapter", dense, LORA)
    merge_adapters(dense, [adapter], tmp_path / "merged", tokenizer_path=bases(torch.bfloat16)[1]["A"])
    expected = peft_merged(dense, [adapter], torch.bfloat16)
    got = read_result(tmp_path / "merged")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("kind", ["odd scaling", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1 << 13, 1 << 17, 3 << 17])
def test_blocks_of_rows_give_the_bits_of_the_whole_product(block, dtype, kind, tmp_path, monkeypatch):
    """Sizes whose last block would be short: 513, 1000 and 1345 rows. The smallest blocks are of 64 rows."""
    monkeypatch.setattr(merge_stream, "_BLOCK_BYTES", block)
    shape = {"hidden_size": 513, "intermediate_size": 1345, "head_dim": 250}
    dense, parts = save_base(tmp_path, dtype, Layout(2, (1,)), **shape)
    adapter = random_adapter(tmp_path / "adapter", dense, {**KINDS[kind], "r": 16})
    expected = peft_merged(dense, [adapter], dtype)
    for part in "AB":
        given = zero_outside(adapter, [0], tmp_path / "for-A") if part == "A" else adapter
        merge_adapters(parts[part], [given], tmp_path / f"{part}_merged")
        for name, tensor in read_result(tmp_path / f"{part}_merged").items():
            assert torch.equal(tensor, expected[name]), name


def test_keys_and_order_of_the_adapter_file_do_not_matter(bases, tmp_path):
    """PEFT reads keys with the adapter's name in them, too; the order in a file means nothing."""
    _, parts = bases(torch.bfloat16)
    adapter = random_adapter(tmp_path / "adapter", bases(torch.bfloat16)[0], LORA)
    merge_adapters(parts["C"], [adapter], tmp_path / "first")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {n.replace(".weight", ".default.weight"): t for n, t in reversed(tensors.items())}
    save_file(renamed, adapter / "adapter_model.safetensors")
    merge_adapters(parts["C"], [adapter], tmp_path / "second")
    first, second = (tmp_path / name / "layer_003.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert len(json.loads((tmp_path / "first/merge.json").read_text())["adapters"][0]["out_of_scope"]) == 4 * 7 * 2
