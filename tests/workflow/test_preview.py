"""What is said before anything runs: sizes that come true, equal work once, what is wrong at the end."""

import copy
import re
import shutil
from pathlib import Path

import pytest

from mistral_prune_lora.workflow.amounts import amounts
from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.dense_models import DenseModels
from mistral_prune_lora.workflow.preview import preview

SCHEMA = Path(__file__).parents[2] / "rules" / "config.schema.yaml"
HUB = {"hub": {"repo_id": "a/b", "revision": "0" * 40}, "num_layers": 8}


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    return project


def shown(project):
    return preview(check_config(project.config, SCHEMA))


def sizes(project, name="tiny"):
    config = check_config(project.config, SCHEMA)
    made = amounts(config, name, DenseModels(config))
    return {kind: sum(a.nbytes for a in made if a.kind == kind) for kind in {a.kind for a in made}}


def row(text, key):
    return re.search(rf"^  {key} +(.*)$", text, re.MULTILINE)[1]


def tensor_bytes(folder):
    """What the weights of a folder take, as their files' headers say."""
    from mistral_prune_lora.storage.safetensors_file import read_header

    files = folder.rglob("*.safetensors")
    return sum(entry.nbytes for file in files for entry in read_header(file).values())


def test_the_sizes_are_those_of_what_a_run_makes(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    found = sizes(finished)
    assert found["pruned parts"] == tensor_bytes(finished.path("pruning"))
    assert found["merged parts"] == tensor_bytes(finished.path("merged"))
    activations = tensor_bytes(finished.folder / "results/shared/activations")
    # A checksum of each of the six windows stands in each of the seven files.
    assert activations - 7 * 6 * 4 == found["activations"]
    assert set(found) == {"pruned parts", "merged parts", "activations"}


def test_sizes_of_adapters_teacher_s_states_and_another_dtype(here):
    experiment = here.config["experiments"]["tiny"]
    experiment["adapters"]["C"] = "train"
    experiment["merge"] = {"output_dtype": "fp32"}
    experiment["distill"] = {
        "dataset": "corpus", "seqlen": 16, "windows": 3, "share_teacher_states": True,
        "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]},
    }  # fmt: skip
    found = sizes(here)
    q, down = (4 * 24, 64), (64, 112)  # out, in
    assert found["adapters"] == 2 * 4 * (sum(q) + sum(down)) * 4
    assert found["teacher's states"] == 3 * 16 * 64 * 2
    assert found["merged parts"] == 2 * found["pruned parts"]
    experiment["distill"]["lora"]["use_dora"] = True
    assert sizes(here)["adapters"] - found["adapters"] == 2 * (q[0] + down[0]) * 4


def test_an_experiment_in_words(here):
    here.config["baseline"] = "tiny"
    here.config["experiments"]["other"] = other = copy.deepcopy(here.config["experiments"]["tiny"])
    other["adapters"]["B"] = "train"
    other["distill"] = {"dataset": "corpus"}
    other["perplexity"]["variants"] = ["dense", "merged"]
    text = shown(here).split("\n\n")[1]
    assert text.splitlines()[0] == "other"
    assert row(text, "model") == "dense (dense), 8 layers"
    assert row(text, "layers") == "A 0-2, 7   B 3-4   C 5-6"
    assert row(text, "adapters") == "A adapters/A   B trained   C adapters/C"
    assert row(text, "trained on") == row(text, "measured on") == "corpus"
    assert row(text, "stages") == "dense FULL; merged A, AB, FULL"
    assert row(text, "beside") == "tiny"


def test_what_experiments_share_counts_once(here):
    before = shown(here)
    assert "beside" not in before
    here.config["experiments"]["same"] = copy.deepcopy(here.config["experiments"]["tiny"])
    after = shown(here)
    for kind in ("pruned parts", "merged parts", "activations", "in all"):
        assert row(before, kind) == row(after, kind)
    here.config["experiments"]["same"]["layers"]["B"] = [3]
    assert row(shown(here), "pruned parts") != row(after, "pruned parts")
    here.config["experiments"]["same"] = copy.deepcopy(here.config["experiments"]["tiny"])
    here.config["experiments"]["same"]["adapters"]["C"] = "adapters/other_C"
    changed = shown(here)
    assert row(changed, "pruned parts") == row(after, "pruned parts")
    assert row(changed, "merged parts") != row(after, "merged parts")


def test_what_is_not_fetched_is_unknown_and_said_to_be(here):
    here.config["models"]["dense"] = HUB
    text = shown(here)
    assert row(text, "model") == "dense (a/b, to be fetched), 8 layers"
    assert row(text, "in all") == "unknown" and "hangs on a model that is not fetched yet" in text
    (here.folder / "dense").rename(here.folder / "resources")  # now as fetched
    (here.folder / "models").mkdir()
    (here.folder / "resources").rename(here.folder / "models/dense")
    (here.folder / "resources").mkdir()
    (here.folder / "models").rename(here.folder / "resources/models")
    text = shown(here)
    assert row(text, "model") == "dense (a/b, fetched), 8 layers"
    assert "unknown" not in text
    here.config["experiments"]["tiny"]["perplexity"]["windows"] = None
    assert row(shown(here), "activations") == "unknown" and row(shown(here), "in all").endswith(" and more")


def test_a_given_pruned_model_is_not_made(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    before = sizes(finished)
    shutil.copytree(finished.path("pruning"), "given")  # as files of its own: links are followed
    experiment = finished.config["experiments"]["tiny"]
    del experiment["layers"]
    experiment["pruned"] = {"A": "given/A", "bundles": "given/bundles"}
    found = sizes(finished)
    assert "pruned parts" not in found and found["merged parts"] == before["merged parts"]
    assert row(shown(finished), "parts") == "given, given/A"


def test_deleted_activations_and_a_full_disk_are_said(here, monkeypatch):
    here.config["keep_activations"] = False
    assert "activations (deleted after use)" in shown(here) and "more than is free" not in shown(here)
    monkeypatch.setattr("mistral_prune_lora.workflow.preview.free_space", lambda path: 10)
    assert row(shown(here), "free in results") == "10B" and "more than is free" in shown(here)


def test_warnings_and_faults_stand_at_the_end(here):
    assert shown(here).endswith("\nwarnings: none\n\nfaults: none\n")
    here.config["experiments"]["tiny"]["perplexity"]["seqlen"] = 300
    here.config["experiments"]["tiny"]["adapters"]["A"] = "no\nwhere"
    *_, warnings, faults = shown(here).split("\n\n")
    assert warnings.splitlines()[0] == "warnings: 1" and "positions" in warnings
    assert faults.splitlines()[0] == "faults: 1" and r"there is no no\nwhere" in faults
