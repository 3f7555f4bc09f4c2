"""What A, the bundles and what is merged say about themselves, read as the original trainer and server read it."""

import json
import shutil

import pytest
from cut_model import save_dense
from merge_oracle import edit_json
from original_tools import (
    installed_pass_layers,
    keys_by_map,
    old_manifests,
    read,
    trainers_indices,
    trainers_split,
    unpad,
)
from tiny import save_adapter, save_tokenizer
from transformers import MistralForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.manifest import read_layout
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.pruning.layeronly_drop import main as layeronly_drop

LAYOUT = Layout(8, (2, 3), (5,))
LOG_KEYS = {"model", "seed", "seqlen", "drop_frac", "keep_last_layer", "selected_block", "split", "params"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dense model, its parts, and an adapter for each."""
    folder = tmp_path_factory.mktemp("made")
    save_tokenizer(save_dense(folder / "dense", vocab_size=259))
    prune_model(
        folder / "dense", LAYOUT, save_dir=folder / "A", save_removed_dir=folder / "bundles", base_model="org/m"
    )
    for part in "ABC":
        save_adapter(folder / "adapters" / part, folder / "dense", list(LAYOUT.layers_of(part)), 0)
    return folder


@pytest.fixture
def there(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(there, base, part, output, **options):
    merge_adapters(
        there / base, [there / "adapters" / part], there / output, settings=MergeSettings(**options), device="cpu"
    )
    return there / output


def counted(folder, layers):
    """Parameters of the whole model and of some layers, as transformers counts them."""
    model = MistralForCausalLM.from_pretrained(folder)
    whole = sum(p.numel() for p in model.parameters())
    return {"P_total": whole, "P_drop": sum(p.numel() for i in layers for p in model.model.layers[i].parameters())}


def test_a_pruned_by_hand_is_read_by_the_original_tools(there):
    a = there / "A"
    assert trainers_split(a) == ([2, 3], [5]) and installed_pass_layers(a) == [2, 3, 5]
    log = read(a, "prune_log.json")
    assert log.keys() >= LOG_KEYS and log["model"] == "org/m" and log["method"] == "fixed"
    assert [log[key] for key in ("seed", "seqlen", "drop_frac", "keep_last_layer")] == [None] * 4
    # The layers are not one block: whoever counts on from a start would switch off the wrong ones.
    assert log["selected_block"] == {"start": None, "n": 3, "indices": [2, 3, 5], "angular_distance": None}
    assert log["split"] == {"policy": None, "ratio": None, "B": [2, 3], "C": [5]}
    assert log["params"] == counted(there / "dense", [2, 3, 5])
    keys = keys_by_map(a)
    assert len(keys) == 8 and [i for i, names in keys.items() if not names] == [2, 3, 5]
    assert len({len(names) for names in keys.values() if names}) == 1
    manifest = read(a, "manifest.json")
    assert manifest["arch"] == manifest["model_type"] == "mistral" and manifest["base_model"] == "org/m"


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_the_model_has_them(tmp_path, tied):
    dense = save_dense(tmp_path / "dense", tie_word_embeddings=tied, vocab_size=259)
    save_tokenizer(dense)
    prune_model(dense, Layout(8, (3,), (4,)), save_dir=tmp_path / "A", save_removed_dir=tmp_path / "bundles")
    log = read(tmp_path / "A", "prune_log.json")
    assert log["params"] == counted(dense, [3, 4])
    assert log["selected_block"] == {"start": 3, "n": 2, "indices": [3, 4], "angular_distance": None}
    assert log["model"] == str(dense)
    assert ("lm_head.weight" in read(tmp_path / "A", "layers_map.json")["non_layer_keys"]) is not tied
    keys_by_map(tmp_path / "A")


def test_a_searched_block_is_logged_as_the_original_script_logs_it(there):
    (there / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    words = "--model dense --device cpu --dtype fp32 --text_file text.txt --nsamples 4 --seqlen 24 --seed 3"
    words += " --drop_frac 0.4 --keep_last_layer --save_dir S/A --save_removed_dir S/bundles --prune_log search.json"
    assert layeronly_drop(words.split()) == 0
    log, manifest = read(there / "S/A", "prune_log.json"), read(there / "S/A", "manifest.json")
    assert log.keys() >= LOG_KEYS
    assert [log[key] for key in ("seed", "seqlen", "drop_frac", "keep_last_layer")] == [3, 24, 0.4, True]
    start = manifest["selection"]["block"]["start"]
    indices = [start, start + 1, start + 2]
    distance = manifest["selection"]["angular_distance"]
    assert log["selected_block"] == {"start": start, "n": 3, "indices": indices, "angular_distance": distance}
    assert log["split"] == {"policy": "half", "ratio": 0.5, "B": indices[:1], "C": indices[1:]}
    assert trainers_indices(there / "S/bundles/B") == indices[:1]
    assert log["params"] == counted(there / "dense", indices)
    # A relative name lies in A's directory, and does not stand in the way of the next run.
    assert read(there / "S/A", "search.json") == log and not (there / "search.json").exists()
    again = words.replace("search.json", str(there / "elsewhere/log.json"))
    assert layeronly_drop(again.replace("S/", "T/").split()) == 0
    assert read(there, "elsewhere/log.json") == read(there / "T/A", "prune_log.json")
    assert layeronly_drop(words.split()) == 0


@pytest.mark.parametrize("name", ["config.json", "logs/x.json", "..", ""])
def test_a_log_that_would_lie_somewhere_else_is_refused(there, capsys, name):
    words = [
        "--model",
        "dense",
        "--b_layers",
        "3",
        "--save_dir",
        "S/A",
        "--save_removed_dir",
        "S/b",
        "--prune_log",
        name,
    ]
    assert layeronly_drop(words) == 1
    assert "--prune_log" in capsys.readouterr().err and not (there / "S").exists()


def test_a_pruned_bundle_says_which_model_it_is_of(there):
    assert read(there / "bundles/B", "bundle_meta.json") == {
        "stage": "B", "base_model": "org/m", "arch": "mistral", "model_type": "mistral", "hidden_size": 64,
        "num_hidden_layers": 8, "indices": [2, 3], "format": "safetensors", "granularity": "layer",
        "pruning_identity": read(there / "A", "manifest.json")["pruning_identity"],
    }  # fmt: skip


def test_a_merged_bundle_says_all_of_that_and_its_layers_under_both_names(there):
    pruned = read(there / "bundles/B", "bundle_meta.json")
    merged = merge(there, "bundles/B", "B", "B_merged")
    assert read(merged, "bundle_meta.json") == {**pruned, "layer_indices": [2, 3], "merged": True}
    assert trainers_indices(merged) == [2, 3]


def test_what_an_old_bundle_lacks_comes_from_the_a_model(there):
    (there / "bundles/C/bundle_meta.json").write_text('{"layer_indices": [5], "merged": true, "note": "mine"}')
    merged = merge(there, "bundles/C", "C", "C_merged", skeleton=there / "A")
    assert read(merged, "bundle_meta.json") == {
        "base_model": "org/m", "arch": "mistral", "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 8,
        "indices": [5], "layer_indices": [5], "merged": True, "note": "mine", "format": "safetensors",
        "granularity": "layer",
    }  # fmt: skip
    (there / "bundles/B/bundle_meta.json").unlink()
    edit_json(there / "adapters/B/adapter_config.json", base_model_name_or_path="gone")
    merged = merge(there, "bundles/B", "B", "B_merged")
    assert read(merged, "bundle_meta.json").keys() == {
        "indices", "layer_indices", "merged", "format", "granularity",
    }  # fmt: skip


def test_a_bundle_of_another_model_is_refused(there):
    edit_json(there / "bundles/B/bundle_meta.json", num_hidden_layers=10)
    with pytest.raises(LayoutError, match=r"num_hidden_layers is 10 in bundle_meta\.json and 8 in the A model"):
        merge(there, "bundles/B", "B", "out", skeleton=there / "A")
    assert not (there / "out").exists()


def test_layers_of_a_model_written_as_a_bundle_describe_themselves(there):
    out = merge(there, "A", "A", "out", save_bundle_only=True)
    meta = read(out, "bundle_meta.json")
    assert meta["indices"] == meta["layer_indices"] == [0, 1, 4, 6, 7]
    assert meta["base_model"] == "org/m" and meta["num_hidden_layers"] == 8 and meta["arch"] == "mistral"


def test_merging_carries_the_log_and_the_map(there):
    edit_json(there / "A/prune_log.json", seed=11, mine={"kept": True})
    out = merge(there, "A", "A", "A_merged")
    assert (out / "prune_log.json").read_bytes() == (there / "A/prune_log.json").read_bytes()
    assert keys_by_map(out) == keys_by_map(there / "A")
    assert trainers_split(out) == ([2, 3], [5]) and installed_pass_layers(out) == [2, 3, 5]
    record = read(out, "merge.json")
    for name in ("prune_log.json", "layers_map.json"):
        assert record["outputs"][name] == file_sha256(out / name)
    assert record["inputs"][str(there / "A/prune_log.json")] == file_sha256(there / "A/prune_log.json")


@pytest.mark.parametrize("name", ["split, no A", "split, no C", "split, kept"])
def test_an_old_a_gets_its_log_and_map_from_its_manifest(there, name):
    (there / "A/manifest.json").write_text(json.dumps(old_manifests(LAYOUT)[name]))
    (there / "A/prune_log.json").unlink()
    (there / "A/layers_map.json").unlink()
    out = merge(there, "A", "A", "A_merged")
    assert trainers_split(out) == ([2, 3], [5])
    log = read(out, "prune_log.json")
    assert log.keys() >= LOG_KEYS and log["seed"] is None and log["drop_frac"] is None
    assert log["model"] == old_manifests(LAYOUT)[name].get("base_model")
    assert log["params"] == counted(there / "dense", LAYOUT.dropped)
    assert [i for i, names in keys_by_map(out).items() if not names] == [2, 3, 5]
    assert (out / "manifest.json").read_bytes() == (there / "A/manifest.json").read_bytes()


def test_a_log_without_a_split_is_completed_and_keeps_what_it_says(there):
    old = {"model": "mine", "seed": 7, "selected_block": {"angular_distance": 0.25}, "extra": [1]}
    (there / "A/prune_log.json").write_text(json.dumps(old))
    log = read(merge(there, "A", "A", "A_merged"), "prune_log.json")
    assert log["split"] == {"policy": None, "ratio": None, "B": [2, 3], "C": [5]}
    assert log["model"] == "mine" and log["seed"] == 7 and log["extra"] == [1]
    assert log["selected_block"] == {"start": None, "n": 3, "indices": [2, 3, 5], "angular_distance": 0.25}


def test_an_unknown_split_is_left_open_and_said(there, capsys):
    (there / "A/manifest.json").write_text(json.dumps(old_manifests(LAYOUT)["simdrop"]))
    (there / "A/prune_log.json").unlink()
    out = merge(there, "A", "A", "A_merged")
    assert trainers_split(out) == (None, None)
    assert read(out, "prune_log.json")["selected_block"]["indices"] == [2, 3, 5]
    assert "nothing says which of layers [2, 3, 5] are B's and which C's" in capsys.readouterr().err
    assert [i for i, names in keys_by_map(out).items() if not names] == [2, 3, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": {"B": [2], "C": [3, 5]}}, r"split\.B is \[2\], but by the manifest it is \[2, 3\]"),
        ({"selected_block": {"indices": [2, 3, 4]}}, r"selected_block\.indices is \[2, 3, 4\], but by the manifest"),
        ({"selected_block": {"indices": [2, "3"]}}, r"selected_block\.indices is \[2, '3'\]"),
        ({"split": [2]}, "split holds no lists B and C"),
    ],
)
def test_a_log_of_another_pruning_is_refused_before_anything_is_written(there, change, message):
    edit_json(there / "A/prune_log.json", **change)
    with pytest.raises(LayoutError, match=message):
        merge(there, "A", "A", "A_merged")
    assert not (there / "A_merged").exists()


def test_a_model_with_its_layers_restored_tells_of_its_new_state(there):
    before = read(there / "A", "prune_log.json")
    out = merge(there, "bundles/B", "B", "AB", save_full_model=True, skeleton=there / "A")
    assert trainers_split(out) == ([], [5]) and installed_pass_layers(out) == [5]
    log = read(out, "prune_log.json")
    assert log["selected_block"] == {"start": 5, "n": 1, "indices": [5], "angular_distance": None}
    assert log["params"] == counted(there / "dense", [5]) and log["drop_frac"] is None
    assert log["restored"] == {"layers": [2, 3], "prune_log_before": before}
    assert [i for i, names in keys_by_map(out).items() if not names] == [5]
    full = merge(there, "bundles/C", "C", "FULL", save_full_model=True, skeleton=out)
    assert trainers_split(full) == ([], []) and read_layout(full) == Layout(8)
    assert read(full, "prune_log.json")["params"]["P_drop"] == 0
    assert all(keys_by_map(full).values()) and read(full, "manifest.json")["arch"] == "mistral"


def test_of_a_compact_a_the_map_gives_the_keys_that_its_weights_have(there):
    from cut_model import make_compact

    make_compact(there / "A", LAYOUT)
    (there / "A/prune.json").unlink()  # which tells of A as it was
    keys = keys_by_map(merge(there, "A", "A", "A_merged"))
    assert {name.split(".")[2] for name in keys[7]} == {"4"} and keys[5] == set()


def test_a_dense_model_that_was_never_pruned_gets_no_log(there):
    out = merge(there, "dense", "A", "out")
    assert not (out / "prune_log.json").exists() and not (out / "layers_map.json").exists()


def test_a_part_without_layers_is_a_bundle_of_none(there):
    """A block of one layer: B's half of it is nothing."""
    words = "--model dense --b_layers 3 --save_dir S/A --save_removed_dir S/bundles"
    assert layeronly_drop(words.replace("--b_layers", "--c_layers").split()) == 0
    assert trainers_split(there / "S/A") == ([], [3]) and trainers_indices(there / "S/bundles/B") == []
    empty = open_checkpoint(there / "S/bundles/B")
    assert empty.kind == "bundle" and empty.layers == ()
    with pytest.raises(LayoutError, match="this bundle holds no layers"):
        merge(there, "S/bundles/B", "B", "out", skeleton=there / "S/A")


def test_unpadded_layers_are_merged_under_padded_names(there):
    plain = merge(there, "bundles/B", "B", "plain")
    unpad(there / "bundles/B")
    (there / "bundles/B/bundle_meta.json").unlink()
    out = merge(there, "bundles/B", "B", "out", skeleton=there / "A")
    for name in ("layer_002.safetensors", "layer_003.safetensors"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    assert trainers_indices(out) == [2, 3]
