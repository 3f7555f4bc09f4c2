"""Model and bundle directories, with safetensors itself beside: canonical names, original indices, what is refused."""

import json
import shutil

import pytest
import torch
from cut_model import cut, make_compact, save_dense
from safetensors.torch import load_file, save_file

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.layout.partition import Layout

LAYOUT = Layout(8, (3, 4), (5, 6))


@pytest.fixture
def parts(tmp_path):
    a, bundles = cut(save_dense(tmp_path / "dense"), LAYOUT, tmp_path)
    return tmp_path / "dense", a, bundles["B"]


def test_every_tensor_has_its_bytes_under_its_canonical_name(parts):
    dense, a, b = parts
    expected = load_file(dense / "model.safetensors")
    found = {}
    for folder in (a, b):
        checkpoint = open_checkpoint(folder)
        found |= {name: checkpoint.read(name) for name in checkpoint.entries}
    missing = {name for name in expected if name.startswith(("model.layers.5.", "model.layers.6."))}
    assert found.keys() == expected.keys() - missing
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_what_it_holds(parts):
    dense, a, b = map(open_checkpoint, parts)
    assert (dense.kind, dense.layers, dense.layout) == ("model", tuple(range(8)), None)
    assert (a.kind, a.layers, a.layout) == ("model", LAYOUT.kept, LAYOUT)
    assert (b.kind, b.layers, b.config, b.layout) == ("bundle", (3, 4), {}, None)
    assert a.config["num_hidden_layers"] == 8 and a.files == (parts[1] / "model.safetensors",)
    assert b.shapes["model.layers.3.mlp.up_proj.weight"] == (112, 64)
    assert set(b.layer(4)) == set(dense.layer(4))


def test_a_tensor_is_cast_when_it_is_read(parts):
    checkpoint = open_checkpoint(parts[0])
    stored = load_file(parts[0] / "model.safetensors")["model.norm.weight"]
    assert torch.equal(checkpoint.read("model.norm.weight", torch.float32), stored.float())


def test_a_compact_a_speaks_of_original_layers(parts):
    plain = open_checkpoint(parts[1])
    make_compact(parts[1], LAYOUT)
    compact = open_checkpoint(parts[1])
    assert compact.layers == plain.layers and compact.config["num_hidden_layers"] == 8
    for name in plain.entries:
        assert torch.equal(compact.read(name), load_file(parts[0] / "model.safetensors")[name])


def test_shards_are_read_by_the_index(parts):
    folder = parts[0]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"model-0000{i}-of-00002.safetensors": list(tensors)[i - 1 :: 2] for i in (1, 2)}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(folder)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        open_checkpoint(folder)


def test_what_is_not_there_is_said(parts, tmp_path):
    checkpoint = open_checkpoint(parts[2])
    with pytest.raises(CheckpointError, match=r"holds no weights of layer 5, only of \[3, 4\]"):
        checkpoint.layer(5)
    with pytest.raises(CheckpointError, match=r"has no tensor lm_head\.weight"):
        checkpoint.read("lm_head.weight")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither a model .* nor a bundle"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="there is no such directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_layer_file_with_another_layer_s_tensors_is_refused(parts):
    bundle = parts[2]
    names = {f"model.layers.4.{n}": t for n, t in load_file(bundle / "layer_003.safetensors").items()}
    save_file(names, bundle / "layer_003.safetensors")
    with pytest.raises(CheckpointError, match="a tensor of another layer"):
        open_checkpoint(bundle)


def test_dropped_layers_with_weights_need_a_known_depth(parts):
    dense, a, _ = parts
    shutil.copy(dense / "model.safetensors", a)
    manifest = json.loads((a / "manifest.json").read_text())
    assert open_checkpoint(a).layers == tuple(range(8))
    del manifest["counts"], manifest["stages"]["A"]["kept_layers"]
    (a / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not say of how many layers"):
        open_checkpoint(a)
