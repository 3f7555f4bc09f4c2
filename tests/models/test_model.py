"""Whole models from pruned parts: equal to plain transformers, able to generate, never with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cut_model import cut, make_compact, random_windows, save_dense
from safetensors.torch import load_file, save_file
from transformers import MistralForCausalLM

from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.load import load_model, restore_bundle
from mistral_prune_lora.pruning.identity import PassLayer

LAYOUTS = [Layout(8, (3, 4), (5, 6)), Layout(8, (0,), (7,)), Layout(8, (0, 1), (5,))]


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def plain(dense, layout: Layout, dtype: torch.dtype) -> MistralForCausalLM:
    """The dense model in plain transformers with PassLayers put in by hand."""
    model = MistralForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    for i in layout.dropped:
        model.model.layers[i] = PassLayer(i)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_has_the_logits_of_plain_transformers_with_pass_layers(tmp_path, layout, dtype, tied):
    dense = save_dense(tmp_path / "dense", tie_word_embeddings=tied)
    a, bundles = cut(dense, layout, tmp_path)
    ids = random_windows(2, 20).ids.long()
    model = load_model(a, dtype=dtype)
    assert not model.training and model.dtype == dtype and model.name_or_path == str(a)
    assert torch.equal(logits(model, ids), logits(plain(dense, layout, dtype), ids))
    whole = load_model(a, dtype=dtype, bundles=tuple(bundles.values()))
    assert torch.equal(logits(whole, ids), logits(load_model(dense, dtype=dtype), ids))
    assert torch.equal(logits(whole, ids), logits(plain(dense, Layout(8), dtype), ids))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_generation_with_a_cache_is_generation_without(tmp_path, layout, sliding_window):
    """A cache measures its length by its first layer, which may be one that was dropped."""
    dense = save_dense(tmp_path / "dense", sliding_window=sliding_window)
    a, bundles = cut(dense, layout, tmp_path)
    ids = random_windows(2, 5).ids.long()
    for restored in ((), tuple(bundles.values())[:1], tuple(bundles.values())):
        model = load_model(a, dtype=torch.float32, bundles=restored)
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
        without = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
        assert torch.equal(cached, without)
        assert len({tuple(row) for row in cached[:, 5:].tolist()}) == 2, "the text matters"
        by_hand = ids
        for _ in range(12):
            step = logits(model, by_hand)[:, -1].clone()
            step[:, model.generation_config.eos_token_id] = -torch.inf
            by_hand = torch.cat([by_hand, step.argmax(-1, keepdim=True)], 1)
        assert torch.equal(cached, by_hand)


@pytest.fixture
def parts(tmp_path):
    dense = save_dense(tmp_path / "dense")
    a, bundles = cut(dense, LAYOUTS[0], tmp_path)
    return dense, a, bundles


def test_a_missing_layer_without_a_manifest_is_refused(parts):
    """`from_pretrained` fills it with random weights, and only prints a report."""
    _, a, _ = parts
    (a / "manifest.json").unlink()
    filled = MistralForCausalLM.from_pretrained(a)
    assert filled.model.layers[3].mlp.up_proj.weight.abs().sum() > 0, "this is what must not happen"
    with pytest.raises(CheckpointError, match=r"has no weights of layer 3, and no manifest\.json says"):
        load_model(a, dtype=torch.float32)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_refused(parts, name):
    _, a, _ = parts
    state = load_file(a / "model.safetensors")
    del state[name]
    save_file(state, a / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(a, dtype=torch.float32)


def test_a_kept_layer_that_is_missing_is_refused(parts):
    _, a, _ = parts
    state = load_file(a / "model.safetensors")
    without = {name: tensor for name, tensor in state.items() if not name.startswith("model.layers.2.")}
    save_file(without, a / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 2"):
        load_model(a, dtype=torch.float32)


def test_a_wrong_shape_is_refused(parts):
    _, a, bundles = parts
    file = bundles["B"] / "layer_003.safetensors"
    state = load_file(file)
    state["mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(state, file)
    with pytest.raises(
        CheckpointError,
        match=r"layers\.3\.mlp\.up_proj\.weight has the shape \(3, 3\), and by config\.json it is \(112, 64\)",
    ):
        load_model(a, dtype=torch.float32, bundles=(bundles["B"],))


def test_a_bundle_of_other_layers_is_refused(parts, tmp_path):
    dense, a, bundles = parts
    model = load_model(a, dtype=torch.float32)
    assert restore_bundle(model, bundles["B"]) == (3, 4)
    with pytest.raises(LayoutError, match="layer 3 of the bundle is not a dropped layer"):
        restore_bundle(model, bundles["B"])
    _, others = cut(dense, Layout(8, (1,), (2,)), tmp_path / "other")
    with pytest.raises(LayoutError, match="layer 1 of the bundle is not a dropped layer"):
        restore_bundle(model, others["B"])
    with pytest.raises(CheckpointError, match="is a bundle, not a model"):
        load_model(bundles["B"], dtype=torch.float32)


def test_every_way_to_store_the_parts_is_read(parts, tmp_path):
    """A compact A; A in shards beside a second copy of everything; bundles whose keys carry a prefix."""
    _, a, bundles = parts
    ids = random_windows(2, 20).ids.long()
    expected = logits(load_model(a, dtype=torch.float32, bundles=tuple(bundles.values())), ids)
    compact, sharded = (Path(shutil.copytree(a, tmp_path / name)) for name in ("compact", "sharded"))
    make_compact(compact, LAYOUTS[0])
    state = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").rename(sharded / "consolidated.safetensors")
    names = {
        "model-00001-of-00002.safetensors": list(state)[::2],
        "model-00002-of-00002.safetensors": list(state)[1::2],
    }
    for file, held in names.items():
        save_file({name: state[name] for name in held}, sharded / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in names.items() for name in held}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for prefix in ("model.layers.{}.", "model.model.layers.{}.", "layers.{}."):
        prefixed = []
        for part, bundle in bundles.items():
            prefixed.append(tmp_path / prefix.split("{")[0] / part)
            prefixed[-1].mkdir(parents=True)
            for i in LAYOUTS[0].layers_of(part):
                layer = load_file(bundle / f"layer_00{i}.safetensors")
                save_file(
                    {prefix.format(i) + n: t for n, t in layer.items()}, prefixed[-1] / f"layer_00{i}.safetensors"
                )
        for stored in (a, compact, sharded):
            model = load_model(stored, dtype=torch.float32, bundles=tuple(prefixed))
            assert torch.equal(logits(model, ids), expected)


def test_an_unknown_model_type_is_refused(parts):
    dense, _, _ = parts
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "model_type": "riddle"}))
    with pytest.raises(CheckpointError, match="model_type 'riddle' is not one that is supported"):
        load_model(dense, dtype=torch.float32)
