"""A pruned model of an older writer in the workflow, and what the workflow's own directories say about themselves."""

import json

from cut_model import cut
from original_tools import installed_pass_layers, keys_by_map, read, trainers_indices, trainers_split, unpad
from safetensors.torch import load_file, save_file

from mistral_prune_lora.layout.partition import Layout

LAYOUT = Layout(8, (3, 4), (5, 6))


def test_what_the_workflow_writes_is_read_by_the_original_tools(finished):
    for name in ("pruning/A", "merged/A_merged"):
        a = finished.path(name)
        assert trainers_split(a) == ([3, 4], [5, 6]) and installed_pass_layers(a) == [3, 4, 5, 6]
        assert [i for i, keys in keys_by_map(a).items() if not keys] == [3, 4, 5, 6]
        log = read(a, "prune_log.json")
        assert log["method"] == "fixed" and log["seed"] is None and log["split"]["policy"] is None
        assert log["selected_block"] == {"start": 3, "n": 4, "indices": [3, 4, 5, 6], "angular_distance": None}
    for name in ("pruning/bundles/B", "merged/B_merged"):
        assert trainers_indices(finished.path(name)) == [3, 4]
        assert read(finished.path(name), "bundle_meta.json")["base_model"] == read(a, "manifest.json")["base_model"]
    # A file that other tools need does not go missing unseen.
    finished.path("merged/A_merged/prune_log.json").unlink()
    assert "place_merge_A" in finished.snakemake("--dry-run")


def test_an_old_pruned_model_gives_the_numbers_of_a_new_one(first_run, project):
    """Its manifest knows the dropped layers only, its A lies in shards, its layer files are not padded."""
    a, bundles = cut(project.folder / "dense", LAYOUT, project.folder / "old")
    (a / "manifest.json").write_text(json.dumps({"simdrop": {"removed_layers": [3, 4, 5, 6]}}))
    for bundle in bundles.values():
        unpad(bundle)
    (bundles["C"] / "bundle_meta.json").unlink()
    split_weights(a)
    experiment = project.config["experiments"]["tiny"]
    del experiment["layers"]
    experiment["pruned"] = {"A": "old/A", "bundles": "old/bundles"}
    experiment["perplexity"] |= {"variants": ["merged"], "stages": ["A", "FULL"]}
    jobs = project.jobs()
    assert not any(rule.startswith("prune") for rule in jobs) and jobs["merge_B_3to4"] == 1
    for stage in ("A", "FULL"):
        ours = read(first_run[0].path("ppl/corpus"), f"merged.{stage}.json")
        assert read(project.path("ppl/corpus"), f"merged.{stage}.json")["mean_nll"] == ours["mean_nll"]
    # Nothing beside A says which layers are B's: the log of the merged model leaves that open.
    assert trainers_split(project.path("merged/A_merged")) == (None, None)
    assert project.planned() == {}
    # An index that changes is a model that changes.
    index = a / "model.safetensors.index.json"
    index.write_text(index.read_text() + "\n")
    assert project.planned()["merge_A"] == 1
    (bundles["B"] / "layer_003.safetensors").write_bytes((bundles["B"] / "layer_3.safetensors").read_bytes())
    assert "layer_003.safetensors and layer_3.safetensors are both layer 3's" in project.snakemake(succeeds=False)


def split_weights(model):
    """Rewrite a model's single file as two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, model / file, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
