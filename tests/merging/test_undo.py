"""Bundles that put original bytes back: FULL is the dense model, however A and B were healed."""

import json
from pathlib import Path

import pytest
import torch
from cut_model import random_windows
from merge_oracle import LAYOUT, peft_merged, random_adapter, save_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.undo import UNDO_FILE
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE
from mistral_prune_lora.models.load import load_model, restore_bundle
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge_command

DTYPES = [torch.float32, torch.bfloat16]
LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["down_proj"]}
CHANGED = 4  # the layer that A's adapter is confined to; the head is adapted too


@pytest.fixture(scope="module", params=DTYPES, ids=["fp32", "bf16"])
def healed(request, tmp_path_factory):
    """(dense model, pruned parts, merged parts that undo, their adapters, dtype)."""
    folder, dtype = tmp_path_factory.mktemp("undo"), request.param
    dense, parts = save_base(folder, dtype)
    of_a = LORA | {"target_modules": ["down_proj", "lm_head"]}
    adapters = {
        "A": random_adapter(folder / "lora_a", dense, of_a | {"layers_to_transform": [CHANGED]}, seed=1),
        "B": random_adapter(folder / "lora_b", dense, LORA | {"layers_to_transform": list(LAYOUT.b)}, seed=2),
    }
    merged = {part: folder / f"{part}_merged" for part in "ABC"}
    of_b = ["--undo_of", parts["A"], merged["A"], "--skeleton", parts["A"]]
    for part, more in (("A", []), ("B", of_b), ("C", ["--undo_of", parts["B"], merged["B"]])):
        adapter = ["--adapter_path", adapters[part]] if part in adapters else []
        told = ["--base_model", parts[part], *adapter, *more, "--output_dir", merged[part], "--device", "cpu"]
        assert merge_command([str(word) for word in told]) == 0
    return dense, parts, merged, adapters, dtype


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(random_windows(2, 12).ids.long()).logits


def stage_of(merged: dict[str, Path], stage: str, dtype: torch.dtype):
    return load_model(
        merged["A"], dtype=dtype, bundles=tuple(merged[part] for part in PARTS_OF_STAGE[stage] if part != "A")
    )


def test_the_undo_holds_the_original_bytes_of_what_the_merges_changed_and_nothing_else(healed):
    dense, _, merged, _, dtype = healed
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).state_dict()
    wanted = {
        "B": {f"model.layers.{CHANGED}.mlp.down_proj.weight", "lm_head.weight"},
        "C": {f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYOUT.b},
    }
    for part, names in wanted.items():
        held = load_file(merged[part] / UNDO_FILE)
        assert held.keys() == names
        assert all(torch.equal(held[name], original[name]) for name in names)
        told = json.loads((merged[part] / "bundle_meta.json").read_text())["undo"]
        assert told["tensors"].keys() == names
        assert told["bytes"] == sum(original[name].nbytes for name in names)


def test_full_is_the_dense_model_and_each_stage_is_pefts(healed):
    dense, _, merged, adapters, dtype = healed
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    assert torch.equal(logits(stage_of(merged, "FULL", dtype)), logits(original))
    # A: PEFT's merge of A's adapter, of which AB has nothing; AB: PEFT's merge of B's.
    for stage, part in (("A", "A"), ("AB", "B")):
        of_peft = peft_merged(dense, [adapters[part]], dtype)
        found = stage_of(merged, stage, dtype).state_dict()
        assert found and all(torch.equal(tensor, of_peft[name]) for name, tensor in found.items())


def test_switching_to_and_fro_gives_the_freshly_loaded_stage(healed):
    *_, merged, _, dtype = healed
    fresh = {stage: logits(stage_of(merged, stage, dtype)) for stage in PARTS_OF_STAGE}
    manager = DynamicStageManager(merged["A"], {part: merged[part] for part in "BC"}, dtype=dtype)
    for stage in ("AB", "A", "FULL", "AB", "FULL", "A"):
        manager.set_stage(stage)
        assert torch.equal(logits(manager.model), fresh[stage])
    model = load_model(merged["A"], dtype=dtype)
    for part, stage in (("B", "AB"), ("C", "FULL")):
        restore_bundle(model, merged[part])
        assert torch.equal(logits(model), fresh[stage])
