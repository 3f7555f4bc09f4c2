"""Telling models from bundles, and B from C: by the manifest first, then by name."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
from cut_model import cut, save_dense

from mistral_prune_lora.errors import CheckpointError, LayoutError, SourceError
from mistral_prune_lora.evaluation.inputs import bundle_part, sort_inputs
from mistral_prune_lora.layout.partition import Layout

LAYOUT = Layout(8, (3, 4), (5, 6))


@pytest.fixture
def parts(tmp_path):
    return cut(save_dense(tmp_path / "dense"), LAYOUT, tmp_path)


def renamed(bundle: Path, name: str) -> Path:
    return Path(shutil.copytree(bundle, bundle.parent / name))


@pytest.mark.parametrize("names", [("B_merged", "C_merged"), ("one", "two"), ("c_merged", "b_merged")])
def test_the_manifest_decides_whatever_the_names_say(parts, names):
    a, bundles = parts
    b, c = (renamed(bundles[part], name) for part, name in zip("BC", names, strict=True))
    for order in ((a, b, c), (c, a, b)):
        inputs = sort_inputs([str(path) for path in order])
        assert inputs.models == [(str(a), a)] and inputs.bundles == {"B": b, "C": c}


@pytest.mark.parametrize(
    ("name", "part"), [("B_merged", "B"), ("c_merged", "C"), ("mistral_b_merged_v2", "B"), ("my.C_MERGED", "C")]
)
def test_without_a_manifest_the_name_decides(parts, name, part):
    assert bundle_part(renamed(parts[1]["B"], name), None) == part


@pytest.mark.parametrize("name", ["layers", "b_merged_and_c_merged", "b"])
def test_a_bundle_that_could_be_either_is_refused(parts, name):
    bundle = renamed(parts[1]["B"], name)
    with pytest.raises(LayoutError, match=r"not clear whether this bundle of layers \[3, 4\] is B or C"):
        bundle_part(bundle, None)
    with pytest.raises(LayoutError, match=r"the manifest gives \[1\] to B and \[2\] to C"):
        bundle_part(bundle, Layout(8, (1,), (2,)))


def test_the_name_of_a_parent_folder_does_not_count(tmp_path, parts):
    bundle = Path(shutil.copytree(parts[1]["B"], tmp_path / "b_merged/layers"))
    with pytest.raises(LayoutError, match="not clear"):
        bundle_part(bundle, None)


def test_a_bundle_named_outright_is_taken_at_its_word(parts):
    a, bundles = parts
    inputs = sort_inputs([str(a)], b_bundle=str(bundles["B"]), c_bundle=str(bundles["C"]))
    assert inputs.bundles == bundles
    with pytest.raises(LayoutError, match="there are 2 bundles for B"):
        sort_inputs([str(a), str(bundles["B"])], b_bundle=str(bundles["C"]))
    with pytest.raises(CheckpointError, match="is not a bundle"):
        sort_inputs([str(a)], b_bundle=str(a))


def test_bundles_dir_may_hold_a_part_that_was_given_no_layers(parts):
    a, bundles = parts
    for file in bundles["C"].iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="is not a bundle"):
        sort_inputs([str(a)], bundles_dir=str(bundles["B"].parent))
    (bundles["C"] / "bundle_meta.json").write_text('{"indices": []}')
    assert sort_inputs([str(a)], bundles_dir=str(bundles["B"].parent)).bundles == bundles


def test_bundles_dir_may_hold_one_bundle(parts):
    a, bundles = parts
    shutil.rmtree(bundles["C"])
    assert sort_inputs([str(a)], bundles_dir=str(bundles["B"].parent)).bundles == {"B": bundles["B"]}


def test_the_first_pruned_model_of_several_decides(parts, tmp_path):
    a, bundles = parts
    paths = [str(tmp_path / "dense"), str(a), str(renamed(bundles["C"], "bundle"))]
    inputs = sort_inputs(paths)
    assert [name for name, _ in inputs.models] == paths[:2] and list(inputs.bundles) == ["C"]


def test_relative_paths_are_no_hub_ids(parts, tmp_path, monkeypatch):
    """transformers would ask the Hub for a repository of that name."""
    a, _ = parts
    monkeypatch.chdir(tmp_path)
    for written in ("A", "./A", "./A/", str(a)):
        assert sort_inputs([written]).models == [(written, a)]
    for wrong in ("./B", "nowhere", "../nowhere/at/all", "~/nowhere"):
        with pytest.raises(CheckpointError, match="there is no such directory"):
            sort_inputs([wrong])


def test_a_hub_id_is_fetched_without_pickles_and_second_copies(parts, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo_id, **patterns):
        asked.update(patterns, repo_id=repo_id)
        return str(tmp_path / "dense")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    inputs = sort_inputs(["mistralai/Mistral-7B-v0.1"])
    assert inputs.models == [("mistralai/Mistral-7B-v0.1", tmp_path / "dense")]
    assert asked["repo_id"] == "mistralai/Mistral-7B-v0.1"
    for file in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"):
        assert not any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    def unreachable(*args, **kwargs):
        raise OSError("no route to the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(SourceError, match="no local directory, and on the Hub the download failed: no route"):
        sort_inputs(["mistralai/Mistral-7B-v0.1"])


def test_a_bundle_without_bundle_meta_is_read_by_its_files(parts):
    a, bundles = parts
    (bundles["B"] / "bundle_meta.json").unlink()
    (bundles["C"] / "bundle_meta.json").write_text(json.dumps({"layer_indices": [5, 6], "merged": True}))
    assert sort_inputs([str(a), *map(str, bundles.values())]).bundles == bundles
