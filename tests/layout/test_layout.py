"""Which layers belong to whom, the tree of segments that stages share, and the files that say so."""

import itertools
import json

import pytest
from cut_model import cut, make_compact, save_dense
from hypothesis import given
from hypothesis import strategies as st

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.descriptions import make_manifest
from mistral_prune_lora.checkpoints.directories import bundle_layers, is_bundle_dir, is_model_dir, weight_files
from mistral_prune_lora.checkpoints.manifest import layout_from_manifest, read_manifest
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.layout.segments import segment_tree, shared_segments, stage_run

MISTRAL = Layout(32, tuple(range(21, 25)), tuple(range(25, 29)))


@st.composite
def layouts(draw) -> Layout:
    """Any partition of up to 12 layers with at least one kept."""
    owners = draw(st.lists(st.sampled_from("ABC"), min_size=1, max_size=12).filter(lambda o: "A" in o))
    return Layout(len(owners), *(tuple(i for i, owner in enumerate(owners) if owner == part) for part in "BC"))


stage_sets = st.lists(st.sampled_from(STAGES), min_size=1, max_size=3, unique=True).map(lambda s: sorted(s))


@given(layouts(), stage_sets)
def test_segments_make_up_every_stage_with_as_few_passes_as_can_be(layout, stages):
    tree = segment_tree(layout, stages)
    by_name = {segment.name: segment for segment in tree}
    assert len(by_name) == len(tree), "names are unique"
    names = [None, *by_name]
    assert all(s.parent in names[: names.index(s.name)] for s in tree), "parents come first"
    for stage in stages:
        (node,) = [s for s in tree if stage in s.ends]
        path = [node]
        while path[0].parent:
            path.insert(0, by_name[path[0].parent])
        assert tuple(itertools.chain(*(s.layers for s in path))) == layout.active(stage)
        assert all(stage in s.through for s in path)
        start, tail = stage_run(tree, stage)
        assert (tail or by_name[start]) == node and (tail is None or tail.parent == start)
        assert tail not in shared_segments(tree)
    # What runs is one pass a distinct sequence of layers from the first on: no sharing can do with fewer.
    prefixes = {layout.active(s)[:n] for s in stages for n in range(1, len(layout.active(s)) + 1)}
    assert sum(len(s.layers) for s in tree) == len(prefixes)
    for segment in tree:
        assert {layout.part_of(i) for i in segment.layers} == {segment.part}


@given(layouts(), stage_sets)
def test_a_name_means_the_same_whatever_stages_are_asked_for(layout, stages):
    def prefixes(tree):
        reached = {None: ()}
        for s in tree:
            reached[s.name] = reached[s.parent] + s.layers
        return {s.name: reached[s.name] for s in tree}

    whole = prefixes(segment_tree(layout))
    for name, reached in prefixes(segment_tree(layout, stages)).items():
        assert whole.get(name, reached) == reached


def test_mistral_7b_takes_38_passes_of_84_and_7_for_a_new_c():
    tree = segment_tree(MISTRAL)
    assert sum(len(MISTRAL.active(s)) for s in STAGES) == 84
    assert sum(len(s.layers) for s in tree) == 38
    after_c = {s.name for s in tree if s.part == "C"}
    for segment in tree:
        if segment.parent in after_c:
            after_c.add(segment.name)
    assert sum(len(s.layers) for s in tree if s.name in after_c) == 7
    assert [(s.name, s.parent, len(s.layers)) for s in tree] == [
        ("A000-020_A", None, 21),
        ("B021-024_AB", "A000-020_A", 4),
        ("C025-028_FULL", "B021-024_AB", 4),
        ("A029-031_FULL", "C025-028_FULL", 3),
        ("A029-031_AB", "B021-024_AB", 3),
        ("A029-031_A", "A000-020_A", 3),
    ]


def test_equal_stages_share_everything():
    """Without B and C all stages are one."""
    (segment,) = segment_tree(Layout(4))
    assert segment.layers == (0, 1, 2, 3) and segment.ends == STAGES and segment.parent is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, (4,)), r"layers \[4\] do not exist in a model of 4 layers"),
        ((4, (-1,)), r"layers \[-1\] do not exist"),
        ((4, (1,), (1, 2)), r"layers \[1\] stand more than once"),
        ((4, (1, 1)), r"layers \[1\] stand more than once"),
        ((2, (0,), (1,)), "every layer is dropped"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(LayoutError, match=message):
        Layout(*arguments)


@given(layouts())
def test_a_manifest_gives_its_layout_back(layout):
    manifest = make_manifest(layout, base_model="dense", model_type="mistral", selection={}, artifacts={})
    again = json.loads(json.dumps(manifest))
    assert layout_from_manifest(again) == layout
    assert again["version"] == "1.0" and again["counts"]["A_kept"] == len(layout.kept)
    # Manifests without counts are told by the layers they list.
    del again["counts"]
    assert layout_from_manifest(again) == layout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"stages": {"A": {}}}', "says nowhere which layers A drops"),
        ('{"stages": {"A": {"dropped_layers": [3, 3]}}}', "stages.A.dropped_layers is not a list"),
        ('{"simdrop": {"removed_layers": "3"}}', "simdrop.removed_layers is not a list"),
        ('{"stages": {"A": {"dropped_layers": ["3"]}}}', "stages.A.dropped_layers is not a list"),
        ('{"stages": []}', "stages is not a JSON object"),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(LayoutError, match=message):
        read_manifest(tmp_path)


def test_a_manifest_whose_bundles_are_not_what_a_dropped_is_refused():
    manifest = make_manifest(MISTRAL, base_model="dense", model_type="mistral", selection={}, artifacts={})
    manifest["stages"]["C"]["removed_layers"].pop()
    told = r"stages\.A\.dropped_layers is \[21.*28\], but stages\.B\.removed_layers and stages\.C.* is \[21.*27\]"
    with pytest.raises(LayoutError, match=told):
        layout_from_manifest(manifest)


@pytest.fixture
def parts(tmp_path):
    layout = Layout(8, (3, 4), (5, 6))
    return cut(save_dense(tmp_path / "dense"), layout, tmp_path)


def test_a_bundle_is_told_from_a_model(parts, tmp_path):
    a, bundles = parts
    assert is_model_dir(a) and not is_bundle_dir(a)
    assert is_bundle_dir(bundles["B"]) and not is_model_dir(bundles["B"])
    assert not is_bundle_dir(tmp_path) and not is_bundle_dir(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["indices", "layer_indices"])
def test_bundle_meta_says_what_the_bundle_holds(parts, key):
    bundle = parts[1]["B"]
    (bundle / "bundle_meta.json").write_text(json.dumps({key: [4, 3]}))
    assert bundle_layers(bundle) == (3, 4)
    (bundle / "bundle_meta.json").unlink()
    assert bundle_layers(bundle) == (3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "cannot be read as JSON"),
        ("{}", "neither layer_indices nor indices"),
        ('{"indices": "3"}', "neither layer_indices nor indices"),
        ('{"indices": [3, "4"]}', "neither layer_indices nor indices"),
        ('{"indices": [3, 4, 5]}', "layer_005.safetensors missing"),
        ('{"indices": [3]}', r"layer_004\.safetensors lies there, but bundle_meta\.json names layers \[3\]"),
        ('{"indices": [3, 4], "layer_indices": [3, 4, 5]}', r"indices \[3, 4\] and layer_indices \[3, 4, 5\] contra"),
        ('{"indices": [3, 4, 4]}', "neither layer_indices nor indices"),
    ],
)
def test_a_malformed_bundle_meta_is_refused(parts, content, message):
    (parts[1]["B"] / "bundle_meta.json").write_text(content)
    with pytest.raises(LayoutError, match=message):
        open_checkpoint(parts[1]["B"])


def test_a_compact_a_is_read_under_its_original_indices(parts):
    a, _ = parts
    original = open_checkpoint(a)
    make_compact(a, original.layout)
    assert json.loads((a / "config.json").read_text())["num_hidden_layers"] == 4
    compact = open_checkpoint(a)
    assert compact.layers == original.layers == (0, 1, 2, 7)
    assert compact.config == original.config
    for layer in compact.layers:
        entries = compact.layer(layer)
        assert set(entries) == set(original.layer(layer))
    assert compact.entries["model.layers.7.mlp.up_proj.weight"].stored_name == "model.layers.3.mlp.up_proj.weight"


def test_weight_files_follow_the_index(tmp_path):
    with pytest.raises(LayoutError, match="only pickled weights"):
        (tmp_path / "pytorch_model.bin").touch()
        weight_files(tmp_path)
    (tmp_path / "consolidated.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x-2", "b": "x-1"}}))
    assert weight_files(tmp_path) == ("x-1", "x-2")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}))
    with pytest.raises(LayoutError, match="not a file beside it"):
        weight_files(tmp_path)
