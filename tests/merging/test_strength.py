"""How much an adapter changes each weight, against the delta that PEFT itself would add."""

import csv
import math
import re
import warnings

import pytest
import torch
from merge_oracle import LAYOUT, LORA_OF_ALL, edit_tensors, random_adapter, save_base, zero_outside
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.merging import strength
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.merging.strength import COLUMNS, write_strength

KINDS = {
    "lora": {**LORA_OF_ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 11}},
    "rslora": {**LORA_OF_ALL, "r": 3, "use_rslora": True},
    "dora": {**LORA_OF_ALL, "use_dora": True},
    "head": {**LORA_OF_ALL, "target_modules": ["v_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A dense model in bf16 and its parts."""
    return save_base(tmp_path_factory.mktemp("base"), torch.bfloat16)


def rows_of(path):
    """The table, by layer (None outside of all) and module."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and tuple(rows[0]) == COLUMNS
    return {(int(row["layer"]) if row["layer"] else None, row["module"]): row for row in rows}


def by_peft(dense, adapter):
    """(|delta|, |weight|, rank) of every weight that PEFT would change, in float32, by layer and module."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, adapter)
    found = {}
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        name = name.removeprefix("base_model.model.")
        before = weights[f"{name}.weight"]
        if module.use_dora["default"]:
            module.merge()
            delta = module.get_base_layer().weight.detach().double() - before
        else:
            delta = module.get_delta_weight("default").detach().double()
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        place = (int(inside[1]), inside[2]) if inside else (None, name)
        found[place] = (float(delta.norm()), float(before.norm()), module.r["default"])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_what_peft_adds(base, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(strength, "_BLOCK", 500)  # bytes: every weight in many pieces
    dense, parts = base
    whole = random_adapter(tmp_path / "whole", dense, KINDS[kind])
    expected = by_peft(dense, whole)
    got = {}
    for part in "ABC":
        layers = LAYOUT.layers_of(part) if part != "A" else LAYOUT.kept
        given = zero_outside(whole, layers, tmp_path / part)
        write_strength(parts[part], given, tmp_path / f"{part}.csv", MergeSettings())
        rows = rows_of(tmp_path / f"{part}.csv")
        assert {layer for layer, _ in rows} <= {None, *layers}
        assert not got.keys() & rows.keys()
        got |= rows
    assert got.keys() == expected.keys()
    for place, (delta, weight, rank) in expected.items():
        row = got[place]
        # The difference of merged and unmerged float32 weights carries the rounding of both.
        assert float(row["delta_norm"]) == pytest.approx(delta, rel=2e-5 if kind == "dora" else 1e-6)
        assert float(row["weight_norm"]) == pytest.approx(weight, rel=1e-12)
        assert float(row["strength"]) == float(row["delta_norm"]) / float(row["weight_norm"])
        assert int(row["rank"]) == rank


def test_layers_come_in_their_order_and_a_weight_of_zeros_has_no_strength(base, tmp_path):
    adapter = random_adapter(tmp_path / "B", base[0], LORA_OF_ALL, layers=LAYOUT.layers_of("B"))
    _, parts = save_base(tmp_path / "zero", torch.float32)
    edit_tensors(parts["B"] / "layer_001.safetensors", lambda tensors: tensors["mlp.up_proj.weight"].zero_())
    write_strength(parts["B"], adapter, tmp_path / "B.csv", MergeSettings())
    rows = rows_of(tmp_path / "B.csv")
    assert list(rows) == sorted(rows)
    empty = rows.pop((1, "mlp.up_proj"))
    assert empty["strength"] == "" and float(empty["weight_norm"]) == 0 and float(empty["delta_norm"]) > 0
    assert all(math.isfinite(float(row["strength"])) for row in rows.values())


def test_an_adapter_that_cannot_be_merged_leaves_no_table(base, tmp_path):
    adapter = random_adapter(tmp_path / "A", base[0], LORA_OF_ALL)  # with layers that A runs without
    with pytest.raises(PipelineError):
        write_strength(base[1]["A"], adapter, tmp_path / "A.csv", MergeSettings())
    assert not (tmp_path / "A.csv").exists()
