"""The merge command as a user meets it: flags, listings, records."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_oracle import LAYOUT, PROJECTIONS, edit_json, peft_merged, random_adapter, read_result, save_base
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mistral_prune_lora.pruning.mistral_merge_adapter import main, parser

LORA = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    dense, _ = save_base(folder, torch.bfloat16)
    for seed, (name, part) in enumerate({"A_lora": "A", "B_lora": "B", "C_lora": "C", "again": "A"}.items()):
        random_adapter(folder / "adapters" / name, dense, LORA, seed=seed, layers=LAYOUT.layers_of(part))
        edit_json(folder / "adapters" / name / "adapter_config.json", base_model_name_or_path="./A")
    return folder


@pytest.fixture
def there(originals, tmp_path, monkeypatch) -> Path:
    """The working directory, with everything in it."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(base: str, adapter: str | None, output: str, *more: str) -> Path:
    words = ["--base_model", base, *(["--adapter_path", adapter] if adapter else []), "--output_dir", output, *more]
    assert main([*words, "--device", "cpu"]) == 0
    return Path(output)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_nine_flags_and_three_more():
    flags = {word for action in parser()._actions for word in action.option_strings} - {"-h", "--help"}
    guide = "base_model adapter_path adapter_paths output_dir device tokenizer_path no_verify save_bundle_only"
    more = ["save_full_model", "skeleton", "max_shard_size", "adapter_indices", "overwrite", "output_dtype", "undo_of"]
    assert flags == {f"--{name}" for name in [*guide.split(), *more]}


def test_a_model_gives_a_full_model(there):
    out = merge("./A", "./adapters/A_lora", "./merged/A_merged")
    assert sorted(os.listdir(out)) == [
        "config.json",
        "generation_config.json",
        "layers_map.json",
        "manifest.json",
        "merge.json",
        "model.safetensors",
        "prune_log.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("config.json", "generation_config.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (there / "A" / name).read_bytes()
    assert (out / "model.safetensors").stat().st_size == (there / "A/model.safetensors").stat().st_size
    assert (out / "model.safetensors").stat().st_size < (there / "dense/model.safetensors").stat().st_size
    assert len(AutoTokenizer.from_pretrained(out)) == 259
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {int(name.split(".")[2]) for name in info["missing_keys"]} == set(LAYOUT.dropped)
    assert not info["unexpected_keys"]
    expected = peft_merged(there / "dense", [there / "adapters/A_lora"], torch.bfloat16)
    assert torch.equal(
        model.state_dict()["model.layers.4.mlp.up_proj.weight"], expected["model.layers.4.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize(("part", "layers"), [("B", [1, 2]), ("C", [3])])
def test_a_bundle_gives_a_bundle(part, layers, there):
    out = merge(f"./bundles/{part}", f"./adapters/{part}_lora", f"./merged/{part}_merged")
    files = [f"layer_{layer:03d}.safetensors" for layer in layers]
    assert sorted(os.listdir(out)) == sorted([*files, "bundle_meta.json", "merge.json"])
    meta = json.loads((out / "bundle_meta.json").read_text())
    assert meta["layer_indices"] == layers
    assert meta["merged"] is True
    for name in files:
        assert load_file(out / name).keys() == load_file(there / f"bundles/{part}" / name).keys()
        assert (out / name).stat().st_size < 1.01 * (there / f"bundles/{part}" / name).stat().st_size


def test_a_bundle_with_prefixed_names_gives_the_same_files(there):
    plain = merge("bundles/B", "adapters/B_lora", "plain")
    for i, prefix in ((1, "model.layers.1."), (2, "model.model.layers.2.")):
        file = there / f"bundles/B/layer_{i:03d}.safetensors"
        save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    prefixed = merge("bundles/B", "adapters/B_lora", "prefixed")
    for i in (1, 2):
        assert (plain / f"layer_{i:03d}.safetensors").read_bytes() == (
            prefixed / f"layer_{i:03d}.safetensors"
        ).read_bytes()


def test_the_skeleton_is_what_the_adapter_names(there, capsys):
    edit_json(there / "A/manifest.json", stages=json.loads((there / "A/manifest.json").read_text())["stages"])
    shutil.copytree("bundles/B", "other")
    shutil.move("other/layer_001.safetensors", "other/layer_000.safetensors")
    edit_json(there / "other/bundle_meta.json", indices=[0, 2])
    assert main(["--base_model", "other", "--adapter_path", "adapters/B_lora", "--output_dir", "out"]) == 1
    assert f"layers [0] of the bundle are not dropped layers of {there / 'A'}" in capsys.readouterr().err


def test_a_full_model_out_of_a_bundle(there, capsys):
    """The skeleton comes from the adapter's base_model_name_or_path; its own adapter is merged already."""
    merge("A", "adapters/A_lora", "A_merged")
    edit_json(there / "adapters/B_lora/adapter_config.json", base_model_name_or_path="./A_merged")
    out = merge("bundles/B", "adapters/B_lora", "AB", "--save_full_model")
    got, kept = read_result(out), read_result(there / "A_merged")
    bundle = read_result(merge("bundles/B", "adapters/B_lora", "B_merged"))
    assert got.keys() == kept.keys() | bundle.keys()
    assert all(torch.equal(tensor, (kept | bundle)[name]) for name, tensor in got.items())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stages"]["A"] == {"kept_layers": [0, 1, 2, 4], "dropped_layers": [3]}
    assert manifest["counts"] == {"L_full": 5, "A_kept": 4, "removed_total": 1, "B": 0, "C": 1}
    assert len(AutoTokenizer.from_pretrained(out)) == 259
    record = json.loads((out / "merge.json").read_text())
    assert [Path(entry["path"]).name for entry in record["merged_before"]] == ["A_lora"]
    assert main(["--base_model", "AB", "--adapter_path", "adapters/A_lora", "--output_dir", "twice"]) == 1
    assert "merged into" in capsys.readouterr().err and not Path("twice").exists()
    # And what C's adapter was trained on may be this model, which has restored B.
    edit_json(there / "adapters/C_lora/adapter_config.json", base_model_name_or_path="./AB")
    full = merge("bundles/C", "adapters/C_lora", "FULL", "--save_full_model")
    _, info = AutoModelForCausalLM.from_pretrained(full, output_loading_info=True)
    assert not info["missing_keys"]
    assert merge("bundles/C", "adapters/C_lora", "C_merged", "--skeleton", "A").is_dir()


def test_an_adapter_trained_on_a_model_that_has_restored_the_bundle(there):
    plain = merge("bundles/B", "adapters/B_lora", "B_merged")
    merge("bundles/B", "adapters/B_lora", "AB", "--save_full_model")
    edit_json(there / "adapters/B_lora/adapter_config.json", base_model_name_or_path="./AB")
    again = merge("bundles/B", "adapters/B_lora", "again")
    assert digest(again / "layer_002.safetensors") == digest(plain / "layer_002.safetensors")


def test_weights_of_dropped_layers_are_left_out(there):
    """A directory with the dense weights and A's manifest gives the same result, of A's size."""
    shutil.copytree("A", "unpruned")
    shutil.copy("dense/model.safetensors", "unpruned")
    merge("A", "adapters/A_lora", "A_merged")
    out = merge("unpruned", "adapters/A_lora", "out")
    assert digest(out / "model.safetensors") == digest(there / "A_merged/model.safetensors")


def test_a_compact_skeleton_is_restored_under_the_original_indices(there):
    tensors = read_result(there / "A")
    compact = {name.replace("layers.4.", "layers.1."): tensor for name, tensor in tensors.items()}
    shutil.copytree("A", "compact")
    save_file(compact, "compact/model.safetensors", metadata={"format": "pt"})
    edit_json(there / "compact/config.json", num_hidden_layers=2)
    plain = merge("bundles/B", "adapters/B_lora", "plain", "--save_full_model", "--skeleton", "A")
    restored = merge("bundles/B", "adapters/B_lora", "restored", "--save_full_model", "--skeleton", "compact")
    assert digest(plain / "model.safetensors") == digest(restored / "model.safetensors")
    assert json.loads((restored / "config.json").read_text())["num_hidden_layers"] == 5
    # A compact A by itself stays compact; its adapter speaks of original indices.
    merged = read_result(merge("compact", "adapters/A_lora", "compact_merged"))
    expected = read_result(merge("A", "adapters/A_lora", "A_merged"))
    assert merged.keys() == compact.keys()
    assert torch.equal(merged["model.layers.1.mlp.up_proj.weight"], expected["model.layers.4.mlp.up_proj.weight"])


def test_a_bundle_out_of_a_model(there):
    out = merge("A", "adapters/A_lora", "out", "--save_bundle_only")
    assert sorted(os.listdir(out)) == [
        "bundle_meta.json",
        "layer_000.safetensors",
        "layer_004.safetensors",
        "merge.json",
    ]
    whole = read_result(merge("A", "adapters/A_lora", "A_merged"))
    for name, tensor in read_result(out).items():
        assert torch.equal(tensor, whole[name])


def test_several_adapters_in_order(there):
    words = ["--adapter_paths", "./adapters/A_lora", "./adapters/again"]
    out = read_result(merge("A", None, "both", *words))
    expected = peft_merged(there / "dense", [there / "adapters/A_lora", there / "adapters/again"], torch.bfloat16)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in out.items())
    record = json.loads(Path("both/merge.json").read_text())
    assert [a["path"] for a in record["adapters"]] == [str(there / f"adapters/{n}") for n in ("A_lora", "again")]


def test_the_tokenizer_can_be_named(there, tmp_path):
    (tmp_path / "other").mkdir()
    save_tokenizer(tmp_path / "other")
    edit_json(tmp_path / "other/tokenizer_config.json", mine=True)
    out = merge("A", "adapters/A_lora", "out", "--tokenizer_path", "./other")
    assert json.loads((out / "tokenizer_config.json").read_text())["mine"] is True


def test_every_tokenizer_file_comes_along(there):
    for name in ("tekken.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (there / "A" / name).parent.mkdir(exist_ok=True)
        (there / "A" / name).write_text(name)
    for _ in range(2):  # a result that holds them is replaced like any other
        out = merge("A", "adapters/A_lora", "out")
        outputs = json.loads((out / "merge.json").read_text())["outputs"]
        for name in ("tekken.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
            assert (out / name).read_text() == name
            assert outputs[name] == digest(there / "A" / name)


@pytest.mark.parametrize(
    ("size", "files"), [("100KB", 5), ("0MB", None), ("0.2MB", None), ("200 kb", None), ("1GB", 1)]
)
def test_shards_that_transformers_loads(size, files, there, capsys):
    if size == "0MB":
        with pytest.raises(SystemExit):
            main(["--base_model", "A", "--adapter_path", "x", "--output_dir", "y", "--max_shard_size", size])
        assert "leaves no room" in capsys.readouterr().err
        return
    out = merge("A", "adapters/A_lora", "out", "--max_shard_size", size)
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert files in (None, len(shards)) or len(shards) > 1
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {int(name.split(".")[2]) for name in info["missing_keys"]} == set(LAYOUT.dropped)
    expected = peft_merged(there / "dense", [there / "adapters/A_lora"], torch.bfloat16)
    names = [name for name in expected if not name.startswith(tuple(f"model.layers.{i}." for i in LAYOUT.dropped))]
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in names)
    # Such a result is a base in its turn, and one file comes out again.
    again = merge("out", "adapters/again", "again")
    twice = merge("A", None, "twice", "--adapter_paths", "adapters/A_lora", "adapters/again")
    assert digest(again / "model.safetensors") == digest(twice / "model.safetensors")
    assert json.loads((again / "merge.json").read_text())["inputs"].keys() >= {str(there / "out" / n) for n in shards}


@pytest.mark.parametrize("part", ["A", "B", "AB"])
def test_the_record_tells_the_truth(part, there):
    base, more = {"A": ("A", []), "B": ("bundles/B", []), "AB": ("bundles/B", ["--save_full_model"])}[part]
    adapter = there / "adapters/A_lora" if part == "A" else there / "adapters/B_lora"
    out = merge(base, str(adapter), "out", *more)
    record = json.loads((out / "merge.json").read_text())
    assert record["outputs"] == {p.name: digest(p) for p in out.iterdir() if p.name != "merge.json"}
    assert record["inputs"] == {path: digest(Path(path)) for path in record["inputs"]}
    weights = {str(p) for p in (there / base).glob("*.safetensors")}
    assert record["inputs"].keys() >= weights | ({str(there / "A/model.safetensors")} if more else set())
    files = record["adapters"][0]["files"]
    assert files == {name: digest(adapter / name) for name in files}
    before = read_result(there / base) | (read_result(there / "A") if more else {})
    changed = [n for n, tensor in read_result(out).items() if not torch.equal(tensor, before[n])]
    assert record["tensors"] == {"merged": len(changed), "copied": len(before) - len(changed)}
    assert len(changed) == 14
    assert len(record["adapters"][0]["out_of_scope"]) == 3 * 7 * 2
    assert record["layers"] == {"A": [0, 4], "B": [1, 2], "AB": [0, 1, 2, 4]}[part]


@pytest.mark.parametrize("base", ["A", "bundles/B"])
def test_the_same_inputs_give_the_same_bytes(base, there):
    first, second = (merge(base, f"adapters/{base[-1]}_lora", name) for name in ("first", "second"))
    names = sorted(os.listdir(first))
    assert names == sorted(os.listdir(second))
    assert [digest(first / name) for name in names] == [digest(second / name) for name in names]


def test_a_former_result_is_replaced_whole(there):
    out = merge("bundles/B", "adapters/B_lora", "out")
    merge("bundles/C", "adapters/C_lora", "out")
    assert sorted(os.listdir(out)) == ["bundle_meta.json", "layer_003.safetensors", "merge.json"]


def test_the_module_runs_as_a_command(there):
    words = "--base_model ./bundles/B --adapter_path ./adapters/B_lora --output_dir ./merged/B_merged --device cpu"
    module = "mistral_prune_lora.pruning.mistral_merge_adapter"
    done = subprocess.run([sys.executable, "-m", module, *words.split()], capture_output=True, text=True, check=True)
    assert (
        "bundle of layers [1, 2]; 14 weights merged, 4 tensors copied, 42 adapter tensors out of scope" in done.stderr
    )
    assert done.stdout == ""
    helped = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "--save_bundle_only" in helped.stdout
