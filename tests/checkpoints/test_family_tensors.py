"""Which tensors a model has: transformers' own models are the measure; what lacks one is neither merged nor pruned."""

import re
import subprocess
import sys

import pytest
import torch
from cut_model import cut, save_dense
from merge_oracle import edit_json, edit_tensors, random_adapter
from safetensors.torch import load_file
from tiny import CONFIGS, save_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.families import FAMILIES
from mistral_prune_lora.checkpoints.family_tensors import check_layers_alike, check_model_tensors, family_tensors
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.models.ends import outside_entries
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.pruning.cut import prune_model

LAYOUT = Layout(5, (1, 2), (3,))
CASES = {
    **{family: (family, {}) for family in FAMILIES},
    "tied": ("mistral", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with some biases": ("llama", {"mlp_bias": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "mistral has none": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "qwen2 with a head size": ("qwen2", {"head_dim": 24}),
    "one key for all heads": ("llama", {"num_key_value_heads": 1}),
}


def shapes_in_transformers(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def all_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    tensors = family_tensors(config, "config.json")
    layers = range(config["num_hidden_layers"])
    return tensors.outside | {f"model.layers.{i}.{name}": s for i in layers for name, s in tensors.layer.items()}


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_transformers(case):
    family, changes = CASES[case]
    config = tiny_config(family, num_hidden_layers=2, **changes)
    assert all_shapes(config.to_dict()) == shapes_in_transformers(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(family):
    few = {"model_type": family, "num_hidden_layers": 1}
    null = [] if family == "mistral" else [{"num_key_value_heads": None}]  # transformers refuses it for Mistral
    for told in ({}, *null, {"num_attention_heads": 16, "hidden_size": 1024}):
        config = CONFIGS[family](**few, **told)
        assert all_shapes({**few, **told}) == shapes_in_transformers(config), told


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'"), ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": None}, "vocab_size is None"), ({"head_dim": -1}, "head_dim is -1"),
        ({"intermediate_size": True}, "intermediate_size is True"),
    ],
)  # fmt: skip
def test_sizes_that_are_none(changes, what):
    with pytest.raises(CheckpointError, match=what):
        family_tensors({**tiny_config().to_dict(), **changes}, "config.json")


def test_torch_is_not_imported():
    rooms = "mistral_prune_lora.checkpoints.family_tensors, mistral_prune_lora.checkpoints.pruning_identity"
    subprocess.run([sys.executable, "-c", f"import sys, {rooms}; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_asked_for_in_its_shape(case):
    family, changes = CASES[case]
    config = tiny_config(family, num_hidden_layers=2, **changes)
    found = shapes_in_transformers(config)
    check_model_tensors(config.to_dict(), {**found, "model.layers.0.self_attn.rotary_emb.inv_freq": (12,)}, [0, 1], "m")
    for name, shape in found.items():
        others = {n: s for n, s in found.items() if n != name}
        with pytest.raises(CheckpointError, match=rf"has no tensor {re.escape(name)} \(in m\)"):
            check_model_tensors(config.to_dict(), others, [0, 1], "m")
        said = f"{name} has the shape (3, 5), and by config.json it is {shape}"
        with pytest.raises(CheckpointError, match=re.escape(said)):
            check_model_tensors(config.to_dict(), {**found, name: (3, 5)}, [0, 1], "m")


def test_a_tied_head_that_is_there_all_the_same_has_its_shape():
    config = tiny_config(tie_word_embeddings=True, num_hidden_layers=1)
    found = shapes_in_transformers(config)
    check_model_tensors(config.to_dict(), {**found, "lm_head.weight": (96, 64)}, [0], "m")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has the shape"):
        check_model_tensors(config.to_dict(), {**found, "lm_head.weight": (96, 32)}, [0], "m")


def test_layers_without_a_configuration_are_compared_with_each_other():
    layer = family_tensors(tiny_config("qwen3").to_dict(), "config.json").layer
    found = {f"model.layers.{i}.{name}": shape for i in (3, 4) for name, shape in layer.items()}
    check_layers_alike({**found, "model.layers.4.self_attn.rotary_emb.inv_freq": (12,)}, [3, 4], "b")
    for short in layer:
        for i in (3, 4):
            name = f"model.layers.{i}.{short}"
            with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
                check_layers_alike({n: s for n, s in found.items() if n != name}, [3, 4], "b")
        with pytest.raises(CheckpointError, match=r"model.layers.4.\S+ has the shape \(3, 5\), and in another layer"):
            check_layers_alike({**found, name: (3, 5)}, [3, 4], "b")
    alone = {name: shape for name, shape in found.items() if name.startswith("model.layers.3.")}
    del alone["model.layers.3.input_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"has no tensor model.layers.3.input_layernorm.weight"):
        check_layers_alike(alone, [3], "b")


GONE = {
    "mistral": [
        "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.4.input_layernorm.weight",
    ],
    "qwen2": ["model.layers.0.self_attn.v_proj.bias"],
    "qwen3": ["model.layers.0.self_attn.k_norm.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in GONE.items() for name in names])
def test_an_incomplete_model_is_refused_by_everything_in_the_same_words(family, name, tmp_path):
    dense = save_dense(tmp_path / "dense", family=family, num_hidden_layers=5)
    save_tokenizer(dense)
    a, _ = cut(dense, LAYOUT, tmp_path / "cut")
    adapter = random_adapter(tmp_path / "adapter", dense, {"r": 2, "target_modules": ["o_proj"]}, layers=LAYOUT.kept)
    for folder in (dense, a):
        edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
        prune_model(dense, LAYOUT, save_dir=tmp_path / "A", save_removed_dir=tmp_path / "removed")
    assert not (tmp_path / "A").exists() and not (tmp_path / "removed").exists()
    for base in (dense, a):
        for options in ({}, {"save_bundle_only": True}):
            with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
                merge_adapters(base, [adapter], tmp_path / "merged", settings=MergeSettings(**options))
        with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
            load_model(base, dtype=torch.float32)
    assert not (tmp_path / "merged").exists()
    if ".layers." not in name:
        with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
            outside_entries(Subject.open(a).model)


@pytest.fixture
def parts(tmp_path):
    dense = save_dense(tmp_path / "dense", num_hidden_layers=5)
    a, bundles = cut(dense, LAYOUT, tmp_path)
    save_tokenizer(a)
    adapter = random_adapter(tmp_path / "adapter", dense, {"r": 2, "target_modules": ["q_proj"]}, layers=LAYOUT.kept)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    return a, bundles, adapter


@pytest.mark.parametrize("with_a", [True, False])
def test_an_incomplete_bundle_is_not_merged(with_a, parts, tmp_path):
    a, bundles, adapter = parts
    skeleton = a if with_a else None
    edit_tensors(bundles["C"] / "layer_003.safetensors", lambda tensors: tensors.pop("input_layernorm.weight"))
    with pytest.raises(CheckpointError, match=r"has no tensor model.layers.3.input_layernorm.weight"):
        merge_adapters(bundles["C"], [adapter], tmp_path / "merged", settings=MergeSettings(skeleton=skeleton))
    file = bundles["B"] / "layer_002.safetensors"
    edit_tensors(file, lambda tensors: tensors.update({"post_attention_layernorm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"model.layers.2.post_attention_layernorm.weight has the shape \(32,\)"):
        merge_adapters(bundles["B"], [adapter], tmp_path / "merged", settings=MergeSettings(skeleton=skeleton))
    with pytest.raises(CheckpointError, match=r"model.layers.2.post_attention_layernorm.weight has the shape \(32,\)"):
        load_model(a, dtype=torch.float32, bundles=(bundles["B"],))
    assert not (tmp_path / "merged").exists()


def test_an_incomplete_skeleton_is_not_restored(parts, tmp_path):
    a, bundles, adapter = parts
    edit_tensors(a / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"has no tensor model.norm.weight \(in .*/A\)"):
        merge_adapters(
            bundles["B"], [adapter], tmp_path / "merged", settings=MergeSettings(skeleton=a, save_full_model=True)
        )


def test_buffers_of_old_checkpoints_are_copied(parts, tmp_path):
    a, bundles, adapter = parts
    name = "self_attn.rotary_emb.inv_freq"
    edit_tensors(a / "model.safetensors", lambda tensors: tensors.update({f"model.layers.0.{name}": torch.ones(12)}))
    edit_tensors(bundles["B"] / "layer_001.safetensors", lambda tensors: tensors.update({name: torch.ones(12)}))
    merge_adapters(a, [adapter], tmp_path / "A_merged")
    merge_adapters(bundles["B"], [adapter], tmp_path / "B_merged")
    merge_adapters(bundles["B"], [adapter], tmp_path / "full", settings=MergeSettings(skeleton=a, save_full_model=True))
    assert f"model.layers.0.{name}" in load_file(tmp_path / "A_merged/model.safetensors")
    assert name in load_file(tmp_path / "B_merged/layer_001.safetensors")
    assert {f"model.layers.{i}.{name}" for i in (0, 1)} <= load_file(tmp_path / "full/model.safetensors").keys()
