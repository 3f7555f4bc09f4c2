"""Stages exported by the workflow: on request only, and again when what they are made of changes."""

import json

from safetensors.torch import load_file


def test_a_stage_is_exported_on_request_and_again_when_a_part_of_it_changes(finished):
    ab, full = (f"results/tiny/exported/merged.{stage}/model.safetensors" for stage in ("AB", "FULL"))
    assert finished.planned() == {}
    assert finished.jobs(ab, full) == {"export_stage": 2}
    assert finished.jobs(ab, full) == {}
    record = json.loads((finished.folder / full).with_name("export.json").read_text())
    assert record["stage"] == "FULL" and len(record["original_index"]) == 8
    exported, merged = (
        load_file(finished.folder / ab),
        load_file(finished.path("merged/B_merged/layer_004.safetensors")),
    )
    # A keeps 0, 1, 2 and 7; with B it is 0, 1, 2, 3, 4, 7.
    assert {int(name.split(".")[2]) for name in exported if ".layers." in name} == set(range(6))
    assert (exported["model.layers.4.mlp.down_proj.weight"] == merged["mlp.down_proj.weight"]).all()
    log = (finished.folder / "logs/export_stage/tiny.merged.AB.log").read_text()
    assert "stage AB as stock, 6 layers [0, 1, 2, 3, 4, 7]" in log

    finished.replace_adapter("C", by="other_C")
    assert finished.planned(ab) == {}
    assert finished.jobs(full) == {"merge_C_5to6": 1, "export_stage": 1}


def test_a_part_without_layers_is_no_part_of_an_export(project):
    project.config["experiments"]["tiny"]["layers"]["C"] = []
    assert project.jobs("results/tiny/exported/pruned.FULL/export.json") == {"prune_B3to4_Cnone": 1, "export_stage": 1}
    record = json.loads(project.path("exported/pruned.FULL/export.json").read_text())
    assert record["parts"] == {"A": [0, 1, 2, 5, 6, 7], "B": [3, 4], "C": []}
