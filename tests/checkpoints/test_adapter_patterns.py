"""Which modules an adapter's configuration speaks of, and with which rank and alpha: PEFT's own functions decide."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from mistral_prune_lora.checkpoints import adapter_config
from mistral_prune_lora.checkpoints.adapter import open_adapter
from mistral_prune_lora.checkpoints.adapter_config import AdapterConfig
from mistral_prune_lora.errors import AdapterError

PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]
MODULES = [f"model.layers.{i}.{name}" for i in (0, 1, 11, 21) for name in PROJECTIONS] + ["lm_head", "model.norm"]
NAMES = ["q_proj", "proj", "up_proj", "self_attn.q_proj", "1.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head"]
PATTERNS = [
    *NAMES,
    r".*\.(q|o)_proj",
    r"model\.layers\.[01]\..*",
    r"layers\.\d+\.mlp\.up_proj",
    "^model.layers.1.self_attn.q_proj",
    ".*_proj",
]


@settings(max_examples=400, deadline=None)
@given(
    target_modules=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3) | st.sampled_from(PATTERNS),
    exclude_modules=st.none() | st.lists(st.sampled_from(NAMES), max_size=2) | st.sampled_from(PATTERNS),
    layers=st.none() | st.just([]) | st.sampled_from([0, 11]) | st.lists(st.sampled_from([0, 1, 21]), min_size=1),
    layers_pattern=st.sampled_from([None, [], "layers", ["blocks", "layers"], ["h"]]),
)
def test_targets_are_those_of_peft(target_modules, exclude_modules, layers, layers_pattern, tmp_path_factory):
    config = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    if not isinstance(target_modules, str):  # PEFT refuses layers beside a regular expression
        config |= {"layers_to_transform": layers, "layers_pattern": layers_pattern if layers else None}
    theirs = LoraConfig(**config)
    where = tmp_path_factory.getbasetemp() / "adapter_config.json"
    ours = AdapterConfig({"peft_type": "LORA", **config}, where)
    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


@settings(max_examples=200, deadline=None)
@given(
    ranks=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 6), max_size=3),
    alphas=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 6), max_size=3),
    rslora=st.booleans(),
)
def test_rank_and_scaling_are_those_of_peft(ranks, alphas, rslora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    tensors, scalings = {}, {}
    adapted = [module for module in MODULES if module != "model.norm"]
    for module in adapted:
        rank = ranks.get(get_pattern_key(ranks, module), 8)
        alpha = alphas.get(get_pattern_key(alphas, module), 16)
        scalings[module] = alpha / rank**0.5 if rslora else alpha / rank
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(rank, 3)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(2, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 8, "lora_alpha": 16, "use_rslora": rslora}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    (folder / "adapter_config.json").write_text(json.dumps(config | patterns))
    updates = open_adapter(folder).updates
    assert {module: update.scaling for module, update in updates.items()} == pytest.approx(scalings, rel=1e-15)
    assert all(update.shape == (2, 3) for update in updates.values())


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("inner", ["model.layers", "layers", "model.model.layers"])
@pytest.mark.parametrize("suffix", ["", ".default"])
def test_names_of_modules_are_understood_with_every_prefix(prefix, inner, suffix, tmp_path):
    tensors = {
        f"{prefix}{inner}.7.mlp.up_proj.lora_{role}{suffix}.weight": torch.zeros(shape)
        for role, shape in (("A", (2, 3)), ("B", (5, 2)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "target_modules": ["up_proj"], "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = open_adapter(tmp_path)
    assert list(adapter.updates) == ["model.layers.7.mlp.up_proj"]
    assert adapter.updates["model.layers.7.mlp.up_proj"].shape == (5, 3)


SLOW = "(.|..)+[XYZ]"


@pytest.mark.parametrize(
    "field",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"layers_pattern": SLOW, "layers_to_transform": [1]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_pattern_that_would_take_for_ever_is_given_up(field, monkeypatch):
    monkeypatch.setattr(adapter_config, "MATCHING_SECONDS", 0.2)
    config = AdapterConfig({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8} | field, "here")
    module = "model.layers.21." + "a" * 60 + ".q_proj"
    with pytest.raises(AdapterError, match="patterns that take more than"):
        config.targets(module)
        config.rank(module)
        config.alpha(module)


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ({"target_modules": ["q_proj"] * 100_000}, "has 100000 names or patterns"),
        ({"rank_pattern": {f"q{i}": 4 for i in range(100_000)}}, "has 100000 names or patterns"),
        ({"alpha_pattern": {"(" * 900 + ")" * 900: 4}}, "of 1800 characters"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern that cannot be used"),
        ({"layers_pattern": 3}, "layers_pattern is 3"),
        ({"layers_to_transform": ["1"]}, "not a list of layer numbers"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}"),
    ],
)
def test_fields_that_peft_never_writes_are_refused(field, what):
    content = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8} | field
    with pytest.raises(AdapterError, match=what):
        AdapterConfig(content, "here")
