"""Adapters as trainers write them that know the layers under several names, save all of them, or count them anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_project import PRUNED, evaluate, results, write_project
from merge_oracle import (
    LAYOUT,
    PROJECTIONS,
    edit_json,
    edit_tensors,
    peft_merged,
    random_adapter,
    read_result,
    save_base,
)
from safetensors.torch import load_file, save_file
from trainers import count_from_zero, with_aliases

from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings

WEIGHTS = "adapter_model.safetensors"
LORA = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS}
NUMBERED = {**LORA, "rank_pattern": {r"layers\.4\..*q_proj": 3}, "alpha_pattern": {r"model\.layers\.4\..*": 11}}
CORPUS = ["--text_file", "eval_corpus.txt", "--seqlen", "32", "--nsamples", "4"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    dense, _ = save_base(folder, torch.bfloat16)
    for seed, part in enumerate("ABC"):
        random_adapter(folder / f"{part}_lora", dense, NUMBERED, seed=seed, layers=LAYOUT.layers_of(part))
    return folder


@pytest.fixture
def there(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "there"))


def record_of(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text())


@pytest.mark.parametrize("part", "ABC")
def test_identical_aliases_are_one_tensor(part, there, tmp_path):
    """An adapter of all layers, every tensor three times: the same bits as PEFT, and all others counted."""
    base = there / ("A" if part == "A" else f"bundles/{part}")
    expected = peft_merged(there / "dense", [there / f"{part}_lora"], torch.bfloat16)
    merge_adapters(base, [with_aliases(there / f"{part}_lora")], tmp_path / "out")
    for name, tensor in read_result(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name]), name
    (adapter,) = record_of(tmp_path / "out")["adapters"]
    assert adapter["aliased_tensors"] == 2 * 5 * 7 * 2
    assert len(adapter["out_of_scope"]) == (5 - len(LAYOUT.layers_of(part))) * 7 * 2


@pytest.mark.parametrize("change", [lambda t: t[0, 0].add_(1), lambda t: t[-1, -1].mul_(-0.0)], ids=["value", "bit"])
def test_aliases_that_differ_are_refused_by_name(change, there, tmp_path):
    with_aliases(there / "B_lora")
    name = "base_model.model._canonical_layers.2.mlp.up_proj.lora_A.weight"

    def spoil(tensors):
        tensors[name][-1, -1] = 0.0
        for other in (name.replace("_canonical_layers", "layers"), name.replace("_canonical_layers", "model.layers")):
            tensors[other][-1, -1] = 0.0
        change(tensors[name])

    edit_tensors(there / "B_lora" / WEIGHTS, spoil)
    with pytest.raises(AdapterError, match=r"_canonical_layers\.2\.mlp\.up_proj\.lora_A\.weight.* differ"):
        merge_adapters(there / "bundles/B", [there / "B_lora"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["vision_tower.encoder.", "model.vision_tower.", "language_model.model.", "mtp."])
def test_layers_of_another_module_are_not_the_language_models(prefix, there, tmp_path):
    def change(tensors):
        for name in [n for n in tensors if ".layers.0." in n]:
            tensors[name.replace("base_model.model.model.", f"base_model.model.{prefix}")] = tensors.pop(name)

    edit_tensors(there / "A_lora" / WEIGHTS, change)
    with pytest.raises(AdapterError, match="neither a decoder layer nor the head"):
        merge_adapters(there / "A", [there / "A_lora"], tmp_path / "out")


def test_compact_indices_are_refused_for_what_they_are_and_mapped_on_request(there, tmp_path):
    merge_adapters(there / "A", [there / "A_lora"], tmp_path / "original")
    count_from_zero(there / "A_lora", LAYOUT.kept)
    with pytest.raises(AdapterError, match=r"layers 0-1 and of no others, and A keeps layers 0, 4.*indices compact"):
        merge_adapters(there / "A", [there / "A_lora"], tmp_path / "refused")
    merge_adapters(
        there / "A", [there / "A_lora"], tmp_path / "mapped", settings=MergeSettings(adapter_indices="compact")
    )
    original, mapped = (read_result(tmp_path / name) for name in ("original", "mapped"))
    assert all(torch.equal(original[name], mapped[name]) for name in original)
    assert [a["indices"] for a in record_of(tmp_path / "mapped")["adapters"]] == ["compact"]


def test_compact_is_refused_where_it_cannot_be(there, tmp_path):
    for base, adapter in (("A", "A_lora"), ("bundles/B", "B_lora"), ("dense", "A_lora")):
        with pytest.raises(AdapterError, match=r"does not count them from 0|the base is no such model"):
            merge_adapters(
                there / base, [there / adapter], tmp_path / "out", settings=MergeSettings(adapter_indices="compact")
            )


def test_an_adapter_that_changes_dropped_layers_is_not_as(there, tmp_path):
    def change(tensors):
        tensors["base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"][0, 0] = 1e-8

    edit_tensors(there / "A_lora" / WEIGHTS, change)
    with pytest.raises(AdapterError, match=r"changes model\.layers\.3\.mlp\.up_proj, a layer that A runs without"):
        merge_adapters(there / "A", [there / "A_lora"], tmp_path / "out")
    merge_adapters(there / "bundles/C", [there / "A_lora"], tmp_path / "C")


def test_the_same_adapter_counts_once(there, tmp_path):
    copy = shutil.copytree(there / "A_lora", there / "copy")
    for twice in ([there / "A_lora", there / "A_lora"], [there / "A_lora", copy]):
        with pytest.raises(AdapterError, match="the same adapter would count twice"):
            merge_adapters(there / "A", twice, tmp_path / "out")
    merge_adapters(there / "A", [there / "A_lora"], tmp_path / "once")
    other = random_adapter(there / "other", there / "dense", LORA, seed=9, layers=LAYOUT.kept)
    merge_adapters(tmp_path / "once", [other], tmp_path / "both")
    for base in ("once", "both"):
        with pytest.raises(AdapterError, match=r"merged into .* already"):
            merge_adapters(tmp_path / base, [copy], tmp_path / "out")
    with pytest.raises(AdapterError, match=r"merged into .* already"):
        merge_adapters(tmp_path / "both", [other], tmp_path / "out")


# --- the same adapters, left unmerged


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    return folder


@pytest.fixture
def folder(project, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(project, tmp_path / "project")
    return tmp_path / "project"


def unmerged(folder: Path, *more: str) -> list[float]:
    found = results(folder, "--model_path", f"{PRUNED}/A", *CORPUS, "--lora_paths", "adapters/A_lora", *more)
    return [r["mean_nll"] for r in found]


def refusal(folder: Path, *words: str, model: str = f"{PRUNED}/A") -> str:
    done = evaluate(folder, "--model_path", model, *CORPUS, "--lora_paths", *words)
    assert done.code == 1
    return done.err


def test_unmerged_adapters_are_read_alike(folder):
    plain = unmerged(folder)
    with_aliases(folder / "adapters/A_lora")
    assert unmerged(folder) == plain
    count_from_zero(folder / "adapters/A_lora", (0, 1, 2, 7))
    assert "--adapter_indices compact" in refusal(folder, "adapters/A_lora")
    assert unmerged(folder, "--adapter_indices", "compact") == plain


def test_unmerged_adapters_are_refused_alike(folder):
    name = "base_model.model.model.layers.7.mlp.down_proj"
    lora = folder / "adapters/A_lora"
    assert "would count twice" in refusal(folder, "adapters/A_lora", "adapters/A_lora")
    assert "counts the 4 layers that A keeps from 0" in refusal(
        folder, "adapters/A_lora", "--adapter_indices", "compact"
    )
    half = load_file(lora / WEIGHTS)
    del half[f"{name}.lora_B.weight"]
    save_file(half, lora / WEIGHTS, metadata={"format": "pt"})
    assert "model.layers.7.mlp.down_proj has no lora_B" in refusal(folder, "adapters/A_lora")
    del half[f"{name}.lora_A.weight"]
    save_file(half, lora / WEIGHTS, metadata={"format": "pt"})
    assert "targets model.layers.7.mlp.down_proj, but holds no tensors" in refusal(folder, "adapters/A_lora")
    half[f"{name}.lora_A.weight"], half[f"{name}.lora_B.weight"] = torch.full((4, 112), torch.nan), torch.ones(64, 4)
    save_file(half, lora / WEIGHTS, metadata={"format": "pt"})
    assert "holds NaN or infinity" in refusal(folder, "adapters/A_lora")


def test_an_adapter_that_is_merged_already_is_not_run_beside_itself(folder):
    merge_adapters(folder / PRUNED / "A", [folder / "adapters/A_lora"], folder / "A_merged")
    assert "merged into" in refusal(folder, "adapters/A_lora", model="A_merged")


def test_unmerged_tensors_of_other_parts_are_counted(folder):
    def change(tensors):
        for role, shape in (("A", (4, 112)), ("B", (64, 4))):
            tensors[f"base_model.model.model.layers.0.mlp.down_proj.lora_{role}.weight"] = torch.zeros(shape)

    edit_json(folder / "adapters/B_lora/adapter_config.json", layers_to_transform=None)
    edit_json(folder / "adapters/B_lora/adapter_config.json", target_modules=["q_proj", "down_proj"])
    edit_tensors(folder / "adapters/B_lora" / WEIGHTS, change)
    words = ["--model_path", f"{PRUNED}/A", "--bundles_dir", f"{PRUNED}/bundles", *CORPUS]
    done = evaluate(folder, *words, "--lora_paths", "adapters/B_lora")
    assert done.code == 0, done.err
    assert "B_lora: on the layers of B; 2 tensors out of scope" in done.out
