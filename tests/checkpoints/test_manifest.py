"""Manifests of every writer: what is read, what is left open until the bundles tell, what is refused."""

import json
import shutil

import pytest
from cut_model import cut, make_compact, save_dense
from original_tools import old_manifests, unpad

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.descriptions import make_manifest
from mistral_prune_lora.checkpoints.directories import bundle_layers, layer_files
from mistral_prune_lora.checkpoints.manifest import layout_from_manifest, read_layout
from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.layout.segments import segment_tree

LAYOUT = Layout(8, (2, 3), (5,))
OPEN = Layout(8, unassigned=(2, 3, 5))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    cut(save_dense(folder / "dense"), LAYOUT, folder)
    return folder


@pytest.fixture
def parts(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "A", {part: tmp_path / "bundles" / part for part in "BC"}


def manifest_of(a, content):
    (a / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", old_manifests(LAYOUT))
def test_every_form_gives_the_dropped_layers(parts, name):
    a, _ = parts
    manifest_of(a, old_manifests(LAYOUT)[name])
    checkpoint = open_checkpoint(a)
    assert checkpoint.layout == (LAYOUT if name.startswith("split") else OPEN)
    assert checkpoint.layers == checkpoint.layout.kept == LAYOUT.kept


@pytest.mark.parametrize("name", old_manifests(LAYOUT))
def test_a_compact_a_is_known_by_a_dropped_layer_beyond_its_own(parts, name):
    a, _ = parts
    make_compact(a, LAYOUT)
    manifest_of(a, old_manifests(LAYOUT)[name])
    assert read_layout(a).dropped == LAYOUT.dropped
    assert open_checkpoint(a).layers == LAYOUT.kept


def test_weights_of_dropped_layers_without_a_layer_count_are_refused(parts):
    """Six layers of six, of which 2 and 3 were dropped: the dense model's weights, or a compact A's of eight."""
    a, _ = parts
    make_compact(a, Layout(8, (2, 3, 5)))
    config = json.loads((a / "config.json").read_text())
    (a / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    manifest_of(a, {"removed_layers": [2, 3]})
    with pytest.raises(CheckpointError, match=r"weights of layers \[2, 3\].*counts\.L_full"):
        open_checkpoint(a)
    manifest_of(a, {"removed_layers": [2, 3], "counts": {"L_full": 7}})
    assert open_checkpoint(a).layers == (0, 1, 4, 5, 6)


def test_what_the_manifest_leaves_open_stands_in_the_log_beside_it(parts):
    a, _ = parts
    manifest_of(a, old_manifests(LAYOUT)["simdrop"])
    log = a / "prune_log.json"
    log.write_text(json.dumps({"model": "dense", "split": {"policy": "half", "B": [2, 3], "C": [5]}}))
    assert read_layout(a) == LAYOUT
    for told in ({}, {"split": None}, {"split": {"B": None, "C": None}}):
        log.write_text(json.dumps(told))
        assert read_layout(a) == OPEN
    log.write_text(json.dumps({"split": {"B": [2], "C": [5]}}))
    with pytest.raises(
        LayoutError, match=r"A drops layers \[2, 3, 5\], but B holds \[2\] and C holds \[5\].*prune_log"
    ):
        read_layout(a)
    log.write_text(json.dumps({"split": {"B": "2 3", "C": [5]}}))
    with pytest.raises(LayoutError, match="split holds no lists B and C"):
        read_layout(a)
    log.write_text(json.dumps({"split": {"B": [2, 3], "C": [5]}}))
    manifest_of(a, old_manifests(LAYOUT)["simdrop"] | {"counts": {"B": 1}})
    with pytest.raises(LayoutError, match=r"counts\.B is 1, but B's layers are \[2, 3\]"):
        read_layout(a)


def test_a_is_whole_while_b_and_c_are_not_known_and_asking_for_them_is_an_error():
    assert OPEN.kept == OPEN.active("A") == (0, 1, 4, 6, 7)
    assert [s.layers for s in segment_tree(OPEN, ["A"])] == [(0, 1, 4, 6, 7)]
    for ask in (lambda: OPEN.active("AB"), lambda: OPEN.layers_of("C"), lambda: OPEN.part_of(3)):
        with pytest.raises(
            LayoutError, match=r"layers \[2, 3, 5\] are dropped, and nothing says which of them are B's"
        ):
            ask()


@pytest.mark.parametrize("given", ["B", "C", "BC"])
def test_bundles_tell_by_the_layers_they_hold(parts, given):
    a, bundles = parts
    manifest_of(a, old_manifests(LAYOUT)["top level"])
    subject = Subject.open(a, {part: bundles[part] for part in given})
    assert subject.layout == LAYOUT
    subject.sources(LAYOUT.active("A"))
    manifest_of(a, {"removed_layers": [2, 6]})
    with pytest.raises(LayoutError, match=rf"A drops layers \[2, 6\], but .*{given[0]} holds"):
        layout = read_layout(a)
        layout.assigned({part: bundle_layers(bundles[part]) for part in given})


def test_restored_layers_leave_the_open_ones_open():
    assert OPEN.without((2, 3)) == Layout(8, unassigned=(5,))
    assert LAYOUT.without((2, 3)) == Layout(8, (), (5,))
    manifest = make_manifest(OPEN, base_model="d", model_type="mistral", selection={}, artifacts={})
    assert layout_from_manifest(manifest) == OPEN and set(manifest["stages"]) == {"A"}


CONTRADICTIONS = {
    "simdrop": ({"simdrop": {"removed_layers": [2, 3]}}, r"stages\.A\.dropped_layers is .*simdrop\.removed_layers is"),
    "nothing": ({"simdrop": {"removed_layers": []}}, r"\[2, 3, 5\], but simdrop\.removed_layers is \[\]"),
    "top": ({"removed_layers": [2, 3, 6]}, r"\[2, 3, 5\], but removed_layers is \[2, 3, 6\]"),
    "L_full": ({"counts": {"L_full": 9}}, r"stages\.A\.kept_layers is .* of 9 layers is \[2, 3, 5\]"),
    "A_kept": ({"counts": {"A_kept": 4}}, r"counts\.A_kept is 4, but the kept layers are \[0, 1, 4, 6, 7\]"),
    "removed": ({"counts": {"removed_total": 4}}, r"counts\.removed_total is 4, but the dropped layers are"),
    "B": ({"counts": {"B": 1}}, r"counts\.B is 1, but B's layers are \[2, 3\]"),
    "C": ({"counts": {"C": "1"}}, r"counts\.C is '1', not a number of layers"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_statements_that_contradict_each_other_are_both_named(parts, case):
    a, _ = parts
    change, message = CONTRADICTIONS[case]
    manifest = json.loads((a / "manifest.json").read_text())
    counts = {**manifest["counts"], **change.pop("counts")} if "counts" in change else manifest["counts"]
    manifest_of(a, {**manifest, "counts": counts, **change})
    with pytest.raises(LayoutError, match=message):
        open_checkpoint(a)


def test_config_and_manifest_of_two_models_are_refused(parts):
    a, _ = parts
    config = json.loads((a / "config.json").read_text())
    (a / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10}))
    with pytest.raises(LayoutError, match=r"config\.json counts 10 layers, the manifest 8, of which A keeps 5"):
        open_checkpoint(a)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"stages": {"A": {"dropped_layers": []}, "B": {"removed_layers": [3]}}}, r"is \[\], but stages\.B.* is \[3\]"),
        (
            {"counts": {"L_full": 8}, "stages": {"B": {"removed_layers": [3]}, "C": {"removed_layers": [3]}}},
            "stand more than once",
        ),
        ({"removed_layers": [3]}, r"neither counts\.L_full nor stages\.A\.kept_layers"),
    ],
)
def test_a_manifest_that_cannot_be(manifest, message):
    with pytest.raises(LayoutError, match=message):
        layout_from_manifest(manifest)


def test_layer_files_need_not_be_padded(parts):
    _, bundles = parts
    before = open_checkpoint(bundles["B"])
    unpad(bundles["B"])
    after = open_checkpoint(bundles["B"])
    assert after.layers == (2, 3) and after.entries.keys() == before.entries.keys()
    assert [p.name for p in layer_files(bundles["B"]).values()] == ["layer_2.safetensors", "layer_3.safetensors"]
    shutil.copy(bundles["B"] / "layer_2.safetensors", bundles["B"] / "layer_002.safetensors")
    for read in (open_checkpoint, bundle_layers):
        with pytest.raises(LayoutError, match=r"layer_002\.safetensors and layer_2\.safetensors are both layer 2's"):
            read(bundles["B"])
