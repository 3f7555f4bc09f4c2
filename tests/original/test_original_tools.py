"""Directories in the shapes of older writers, all the way: pruned, merged, trained on, evaluated."""

import json
import shutil

import pytest
import torch
from cut_model import cut, make_compact, random_windows, save_dense
from evaluation_project import evaluate, results
from merge_oracle import edit_json
from original_tools import keys_by_map, old_manifests, read, trainers_split, unpad
from tiny import save_adapter, save_tokenizer
from training_jobs import train_job
from transformers import AutoModelForCausalLM, MistralForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.directories import weight_files
from mistral_prune_lora.distillation.settings import OptimiserSettings
from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.pruning.cut import prune_model

LAYOUT = Layout(8, (3, 4), (5, 6))
SMALL = ["--text_file", "corpus.txt", "--seqlen", "32", "--nsamples", "4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A user's directory: the dense model, its parts, adapters, a text."""
    folder = tmp_path_factory.mktemp("made")
    save_tokenizer(save_dense(folder / "dense", vocab_size=259))
    cut(folder / "dense", LAYOUT, folder)
    for part in "ABC":
        save_adapter(folder / "adapters" / part, folder / "dense", list(LAYOUT.layers_of(part)), 0)
    (folder / "corpus.txt").write_text("\n".join(f"Line {i} is about {i * i}." for i in range(100)))
    return folder


@pytest.fixture
def there(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def nll(folder, *arguments):
    """Mean NLL by label."""
    return {r["label"]: r["mean_nll"] for r in results(folder, *arguments, *SMALL)}


def forget(a, name="simdrop"):
    """Give A the manifest of an older writer."""
    (a / "manifest.json").write_text(json.dumps(old_manifests(LAYOUT)[name]))


def shard(model):
    """Rewrite a directory's weights as shards with an index, as transformers does for large models."""
    (model / "big").mkdir()
    loaded = MistralForCausalLM.from_pretrained(model, dtype="auto")
    loaded.save_pretrained(model / "big", max_shard_size="100KB")
    stored = {name for name, entry in open_checkpoint(model).entries.items() if entry}
    index = json.loads((model / "big/model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in stored}
    (model / "model.safetensors").unlink()
    for file in (model / "big").glob("*.safetensors"):
        shutil.move(file, model / file.name)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(model / "big")
    assert len(weight_files(model)) > 2


@pytest.mark.parametrize("name", ["simdrop", "split, no A"])
def test_an_old_manifest_gives_the_numbers_of_a_new_one(there, name):
    bundles = ("--b_bundle", "bundles/B", "--c_bundle", "bundles/C")
    expected = nll(there, "--model_path", "A", *bundles)
    alone = nll(there, "--model_path", "A", "--lora_paths", "adapters/A")
    forget(there / "A", name)
    assert nll(there, "--model_path", "A", "--lora_paths", "adapters/A") == alone
    assert nll(there, "--model_path", "A", *bundles) == expected
    assert nll(there, "--model_path", "A", "--bundles_dir", "bundles", "--stages", "AB,FULL") == {
        label: value for label, value in expected.items() if label != "A[A]"
    }
    merge_adapters("A", ["adapters/A"], "A_merged", device="cpu")
    assert nll(there, "--model_path", "A_merged")["A_merged[A]"] != alone["A[A]"]


def test_what_nothing_tells_is_asked_for_and_not_guessed(there):
    forget(there / "A")
    for stages in ("AB", "FULL"):
        done = evaluate(there, "--model_path", "A", "--stages", stages, *SMALL)
        assert done.code == 1 and "nothing says which of them are B's and which C's" in done.err
    done = evaluate(there, "--model_path", "A", "bundles/B", *SMALL)
    assert done.code == 1 and "Name it with --b_bundle or --c_bundle" in done.err
    shutil.copytree("bundles/B", "other_B_merged")
    shutil.move("other_B_merged/layer_003.safetensors", "other_B_merged/layer_002.safetensors")
    edit_json(there / "other_B_merged/bundle_meta.json", indices=[2, 4])
    done = evaluate(there, "--model_path", "A", "other_B_merged", "--stages", "AB", *SMALL)
    assert done.code == 1 and "A drops layers [3, 4, 5, 6], but B holds [2, 4]" in done.err


def test_a_model_in_memory_learns_its_stages_from_the_bundles(there):
    forget(there / "A")
    ids = random_windows(1, 16).ids.long()
    dense = MistralForCausalLM.from_pretrained("dense", dtype=torch.float32)
    manager = DynamicStageManager("A", {"B": "bundles/B", "C": "bundles/C"}, dtype=torch.float32)
    manager.set_stage("FULL")
    with torch.inference_mode():
        assert torch.equal(manager.model(ids).logits, dense(ids).logits)
    alone = DynamicStageManager("A", {}, dtype=torch.float32)
    alone.set_stage("A")
    with pytest.raises(LayoutError, match="nothing says which of them"):
        alone.set_stage("AB")


@pytest.mark.parametrize(("stage", "bundles"), [("A", []), ("B", ["B"]), ("C", ["B", "C"])])
def test_training_on_an_old_a_adapts_the_layers_of_its_part(there, stage, bundles):
    forget(there / "A")
    train_job(
        stage,
        student_dir="A",
        teacher_dir="dense",
        windows=random_windows(2, 16),
        output_dir="lora",
        bundles=[f"bundles/{part}" for part in bundles],
        optimiser=OptimiserSettings(steps=1, gradient_accumulation=1, warmup_steps=0),
        dtype=torch.float32,
    )
    assert read(there / "lora", "training.json")["layers"] == list(LAYOUT.layers_of(stage))


def test_training_c_where_b_holds_no_layers(there):
    layout = Layout(8, (), (3,))
    prune_model("dense", layout, save_dir="S/A", save_removed_dir="S/bundles")
    (there / "S/A/manifest.json").write_text(json.dumps({"removed_layers": [3]}))
    (there / "S/A/prune_log.json").unlink()
    settings = {
        "student_dir": "S/A", "teacher_dir": "dense", "windows": random_windows(2, 16), "output_dir": "lora",
        "optimiser": OptimiserSettings(steps=1, gradient_accumulation=1, warmup_steps=0), "dtype": torch.float32,
    }  # fmt: skip
    train_job("C", bundles=["S/bundles/C"], **settings)
    assert read(there / "lora", "training.json")["layers"] == [3]
    with pytest.raises(LayoutError, match="B holds no layers"):
        train_job("B", bundles=["S/bundles/B"], **settings)


def test_stages_of_a_model_whose_b_holds_no_layers(there):
    prune_model("dense", Layout(8, (), (3,)), save_dir="S/A", save_removed_dir="S/bundles")
    whole = nll(there, "--model_path", "dense")["dense[dense]"]
    got = nll(there, "--model_path", "S/A", "--bundles_dir", "S/bundles")
    assert list(got) == ["A[A]", "A[AB]", "A[ABC]"]
    assert got["A[A]"] == got["A[AB]"] != whole and got["A[ABC]"] == whole
    assert nll(there, "--model_path", "S/A", "S/bundles/B", "S/bundles/C") == got
    shutil.copytree("S/bundles/B", "B_merged")
    assert nll(there, "--model_path", "S/A", "--b_bundle", "B_merged", "--c_bundle", "S/bundles/C") == got


def test_unpadded_layers_are_evaluated(there):
    bundles = ("--b_bundle", "bundles/B", "--c_bundle", "bundles/C")
    before = nll(there, "--model_path", "A", *bundles)
    for part in "BC":
        unpad(there / "bundles" / part)
    assert nll(there, "--model_path", "A", *bundles) == before
    shutil.copy("bundles/B/layer_3.safetensors", "bundles/B/layer_003.safetensors")
    done = evaluate(there, "--model_path", "A", *bundles, *SMALL)
    assert done.code == 1 and "layer_003.safetensors and layer_3.safetensors are both layer 3's" in done.err


def test_shards_are_read_wherever_a_model_is(there):
    single = nll(there, "--model_path", "A", "dense", "--bundles_dir", "bundles")
    merge_adapters("A", ["adapters/A"], "A_single", device="cpu")
    merge_adapters(
        "bundles/B",
        ["adapters/B"],
        "AB_single",
        settings=MergeSettings(skeleton="A", save_full_model=True),
        device="cpu",
    )
    prune_model("dense", LAYOUT, save_dir="P_single/A", save_removed_dir="P_single/bundles")
    for model in ("A", "dense"):
        shard(there / model)
        # A file beside the shards that the index does not name is no part of the model.
        shutil.copy("bundles/B/layer_003.safetensors", there / model / "consolidated.safetensors")
    assert nll(there, "--model_path", "A", "dense", "--bundles_dir", "bundles") == single
    merge_adapters("A", ["adapters/A"], "A_sharded", device="cpu")
    merge_adapters(
        "bundles/B",
        ["adapters/B"],
        "AB_sharded",
        settings=MergeSettings(skeleton="A", save_full_model=True),
        device="cpu",
    )
    prune_model("dense", LAYOUT, save_dir="P_sharded/A", save_removed_dir="P_sharded/bundles")
    for kind in ("A", "AB", "P"):
        folders = [there / f"{kind}_{how}" / ("A" if kind == "P" else "") for how in ("single", "sharded")]
        first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
        assert first == second
        assert keys_by_map(folders[0]) == keys_by_map(folders[1])
    assert trainers_split(there / "A_sharded") == ([3, 4], [5, 6])


def test_of_a_single_file_and_an_index_transformers_and_this_pipeline_take_the_single_file(there):
    save_dense(there / "other", seed=1, vocab_size=259)
    single, indexed = (open_checkpoint(model).read("lm_head.weight") for model in ("other", "dense"))
    shard(there / "dense")
    shutil.copy("other/model.safetensors", "dense/model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, single) and not torch.equal(single, indexed)
    assert weight_files("dense") == ("model.safetensors",)
    assert torch.equal(open_checkpoint("dense").read("lm_head.weight"), loaded.lm_head.weight)


def test_a_shard_that_the_index_names_and_is_missing(there):
    shard(there / "A")
    (there / "A" / weight_files("A")[0]).unlink()
    with pytest.raises(CheckpointError, match="which is missing"):
        merge_adapters("A", ["adapters/A"], "A_merged", device="cpu")


def test_a_compact_a_with_an_old_manifest_is_merged_and_evaluated(there):
    before = nll(there, "--model_path", "A")
    make_compact(there / "A", LAYOUT)
    forget(there / "A")
    assert nll(there, "--model_path", "A") == before
