"""Pruning as a file transformation: nothing lost, nothing changed, everything described."""

import json

import pytest
import torch
from cut_model import save_dense
from safetensors.torch import load_file
from tiny import save_tokenizer
from transformers import MistralForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.manifest import layout_from_manifest, read_manifest
from mistral_prune_lora.errors import CheckpointError, LayoutError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.pruning.cut import prune_model, split_block

LAYOUT = Layout(8, (3, 4), (5, 6))


@pytest.fixture
def dense(tmp_path):
    folder = save_dense(tmp_path / "dense", vocab_size=259)
    save_tokenizer(folder)
    return folder


def prune(dense, folder, layout=LAYOUT):
    prune_model(dense, layout, save_dir=folder / "A", save_removed_dir=folder / "bundles")
    return folder / "A", folder / "bundles"


def tensors(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


@pytest.mark.parametrize("layout", [LAYOUT, Layout(8, (0, 7), (3,)), Layout(8, (2,), ()), Layout(8, (), (1,))])
def test_the_parts_together_are_the_dense_model(dense, tmp_path, layout):
    a, bundles = prune(dense, tmp_path, layout)
    whole = load_file(dense / "model.safetensors")
    parts = [tensors(a), *(tensors(bundles / part) for part in "BC" if layout.layers_of(part))]
    together = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(map(len, parts)) == len(together) == len(whole)
    assert all(torch.equal(together[n], t) and together[n].dtype == t.dtype for n, t in whole.items())
    held = {int(n.split(".")[2]) for n in load_file(a / "model.safetensors") if ".layers." in n}
    assert held == set(layout.kept)


def test_a_with_both_bundles_restored_computes_what_the_dense_model_computes(dense, tmp_path):
    a, bundles = prune(dense, tmp_path)
    ids = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(0))
    restored = load_model(a, dtype=torch.bfloat16, bundles=(bundles / "B", bundles / "C"))
    plain = MistralForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(restored(ids).logits, plain(ids).logits)
        assert not torch.equal(load_model(a, dtype=torch.bfloat16)(ids).logits, plain(ids).logits)


def test_every_directory_describes_itself(dense, tmp_path):
    a, bundles = prune(dense, tmp_path)
    manifest = read_manifest(a)
    assert layout_from_manifest(manifest) == LAYOUT
    assert manifest["version"] == "1.0" and manifest["model_type"] == "mistral"
    assert manifest["counts"] == {"L_full": 8, "A_kept": 4, "removed_total": 4, "B": 2, "C": 2}
    assert manifest["base_model"] == str(dense)
    for name in ("A", "B", "C", "original_config"):
        assert (tmp_path / manifest["artifacts"][name]["dir"]).is_dir()
    listed = {p.name for p in a.iterdir()}
    assert listed == {
        "config.json", "generation_config.json", "manifest.json", "layers_map.json", "prune_log.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "original_config", "prune.json",
    }  # fmt: skip
    assert json.loads((a / "config.json").read_text())["num_hidden_layers"] == 8
    assert (a / "original_config/config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert json.loads((a / "original_config/source.json").read_text()) == {"path": str(dense)}
    meta = json.loads((bundles / "B/bundle_meta.json").read_text())
    assert meta["indices"] == [3, 4] and meta["num_hidden_layers"] == 8 and meta["granularity"] == "layer"
    assert sorted(p.name for p in (bundles / "C").iterdir()) == [
        "bundle_meta.json", "layer_005.safetensors", "layer_006.safetensors", "prune.json",
    ]  # fmt: skip
    for part, folder in (("A", a), ("B", bundles / "B"), ("C", bundles / "C")):
        record = json.loads((folder / "prune.json").read_text())
        assert (record["command"], record["part"]) == ("prune", part) and record["versions"].keys() == {
            "mistral-prune-lora"
        }
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        assert sorted(record["files"]) == sorted(files)
    assert set(load_file(bundles / "B/layer_003.safetensors")) >= {"self_attn.q_proj.weight", "input_layernorm.weight"}


def test_every_tokenizer_file_comes_along_and_is_kept_as_it_was(dense, tmp_path):
    for name in ("tekken.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(name)
    a, _ = prune(dense, tmp_path)
    for name in ("tekken.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        assert (a / name).read_text() == (a / "original_config" / name).read_text() == name


def test_layers_of_a_former_pruning_do_not_stay(dense, tmp_path):
    prune(dense, tmp_path)
    _, bundles = prune(dense, tmp_path, Layout(8, (2,), (5,)))
    assert [p.name for p in (bundles / "B").glob("*.safetensors")] == ["layer_002.safetensors"]


def test_a_sharded_dense_model_and_tied_embeddings(tmp_path):
    torch.manual_seed(0)
    dense = save_dense(tmp_path / "dense", tie_word_embeddings=True, vocab_size=259)
    model = MistralForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    save_tokenizer(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    a, _ = prune(tmp_path / "sharded", tmp_path)
    assert "lm_head.weight" not in load_file(a / "model.safetensors")
    loaded = load_model(a, dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_failure_leaves_no_half_of_anything(dense, tmp_path):
    weights = dense / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        prune(dense, tmp_path)
    assert not (tmp_path / "A").exists() and not (tmp_path / "bundles").exists()


def test_what_cannot_be_pruned_is_refused(dense, tmp_path):
    with pytest.raises(LayoutError, match="8 layers, the layout is for 9"):
        prune(dense, tmp_path, Layout(9, (3,), (4,)))
    a, bundles = prune(dense, tmp_path)
    with pytest.raises(CheckpointError, match="no weights of layers"):
        prune(a, tmp_path / "again")
    with pytest.raises(CheckpointError, match="bundle"):
        prune(bundles / "B", tmp_path / "again")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(PipelineError, match=r"thesis\.txt"):
        prune_model(dense, LAYOUT, save_dir=tmp_path / "mine", save_removed_dir=tmp_path / "b")


@pytest.mark.parametrize(("a", "removed"), [("y", "y"), ("y/B", "y"), ("B/A", "."), ("dense/A", "z"), ("z", "dense")])
def test_directories_that_lie_in_one_another_are_refused_before_anything_is_written(dense, tmp_path, a, removed):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PipelineError, match=r"lie in one another|lies in an input, .*/dense"):
        prune_model(dense, LAYOUT, save_dir=tmp_path / a, save_removed_dir=tmp_path / removed)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("size", "options", "b"),
    [
        (8, {}, 4), (5, {}, 2), (1, {}, 0),
        (8, {"policy": "ratio", "ratio": 0.25}, 2), (8, {"policy": "ratio", "ratio": 0.01}, 0),
        (8, {"policy": "ratio", "ratio": 0.99}, 8), (5, {"policy": "ratio", "ratio": 0.5}, 2),
    ],
)  # fmt: skip
def test_the_block_is_split_in_order(size, options, b):
    first, second = split_block(10, size, **options)
    assert first + second == tuple(range(10, 10 + size)) and len(first) == b


def test_policies_that_do_not_exist():
    with pytest.raises(LayoutError, match="split policy"):
        split_block(0, 4, policy="thirds")
    with pytest.raises(LayoutError, match="share"):
        split_block(0, 4, policy="ratio", ratio=1.01)
