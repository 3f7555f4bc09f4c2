"""What runs, and what does not run again: snakemake on a tiny project, for real."""

import json

import pandas as pd
from safetensors import safe_open
from trainers import count_from_zero, with_aliases
from workflow_project import EVERYTHING, result

STAGES = ("A", "AB", "FULL")


def test_the_first_run_makes_everything_and_the_second_nothing(first_run, finished):
    assert first_run[1] == EVERYTHING
    assert finished.jobs() == {}


def test_pruned_full_is_the_dense_model_and_every_stage_has_its_row(finished):
    pruned, dense = result(finished, "pruned", "FULL"), result(finished, "dense", "FULL")
    assert pruned["mean_nll"] == dense["mean_nll"]
    table = pd.read_csv(finished.folder / "results/summary.csv")
    assert list(zip(table.variant, table.stage, strict=True)) == [
        ("dense", "FULL"),
        *(("pruned", stage) for stage in STAGES),
        *(("merged", stage) for stage in STAGES),
    ]
    assert set(table.experiment) == {"tiny"} and set(table.dataset) == {"corpus"}
    assert table.active_layers.tolist() == [8, 4, 6, 8, 4, 6, 8]
    assert table.tokens.tolist() == [6 * 31] * 7


def test_a_replaced_adapter_reruns_what_it_goes_into_and_nothing_else(finished):
    before = {stage: result(finished, "merged", stage)["ppl"] for stage in STAGES}
    finished.replace_adapter("C", by="other_C")
    assert finished.jobs() == {"merge_C_5to6": 1, "segment": 1, "perplexity": 1, "summary": 1, "plot_perplexity": 1}
    after = {stage: result(finished, "merged", stage)["ppl"] for stage in STAGES}
    assert after["A"] == before["A"] and after["AB"] == before["AB"] and after["FULL"] != before["FULL"]

    finished.replace_adapter("B", by="other_B")
    assert finished.jobs() == {"merge_B_3to4": 1, "segment": 2, "perplexity": 2, "summary": 1, "plot_perplexity": 1}
    assert result(finished, "merged", "A")["ppl"] == before["A"]
    assert result(finished, "merged", "AB")["ppl"] != before["AB"]


def test_adapters_as_other_trainers_save_them_give_the_same_numbers(finished):
    before = {stage: result(finished, "merged", stage)["ppl"] for stage in STAGES}
    count_from_zero(finished.folder / "adapters/A", (0, 1, 2, 7))
    with_aliases(finished.folder / "adapters/B")
    assert "adapter_indices: compact" in finished.snakemake(succeeds=False)
    finished.config["experiments"]["tiny"]["adapter_indices"] = "compact"
    assert {"merge_A", "perplexity"} <= set(finished.jobs())  # B may have been merged before A failed
    assert {stage: result(finished, "merged", stage)["ppl"] for stage in STAGES} == before
    table = pd.read_csv(finished.folder / "results/summary.csv")
    assert table[table.variant == "merged"].adapter_tensors_out_of_scope.tolist() == [0, 0, 0]


def test_a_changed_setting_reruns_what_uses_it(finished):
    perplexity = finished.config["experiments"]["tiny"]["perplexity"]
    perplexity["windows"] = 5
    assert finished.planned() == {rule: n for rule, n in EVERYTHING.items() if not rule.startswith(("prune", "merge"))}
    perplexity["windows"] = 6
    perplexity["compare_with_dense"] = False
    assert finished.planned() == {"perplexity": 6, "summary": 1, "plot_perplexity": 1}
    perplexity["compare_with_dense"] = True
    tokenizer = finished.folder / "dense/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert {"windows", "prune_B3to4_C5to6"} <= set(finished.planned())
    tokenizer.write_text(tokenizer.read_text()[:-1])
    # Another profile value or number of cores is no reason to compute anything again.
    assert finished.planned("--set-resources", "segment:mem_mb=3000", "merge_A:gpu=0") == {}


def test_another_dtype_of_the_merged_parts_merges_them_again(finished):
    finished.config["experiments"]["tiny"]["merge"] = {"output_dtype": "fp16"}
    assert finished.planned() == {
        rule: n for rule, n in EVERYTHING.items() if rule not in ("prune_B3to4_C5to6", "windows", "dense_perplexity")
    } | {"segment": 3, "perplexity": 3}
    assert finished.jobs("results/tiny/merged/B_merged/merge.json") == {"merge_B_3to4": 1}
    with safe_open(finished.path("merged/B_merged/layer_003.safetensors"), "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_parts_hold_their_own_layers_and_no_others(finished):
    with safe_open(finished.path("merged/A_merged/model.safetensors"), "pt") as weights:
        layers = {int(name.split(".")[2]) for name in weights.keys() if ".layers." in name}  # noqa: SIM118
    assert layers == {0, 1, 2, 7}
    for part, held in (("B", [3, 4]), ("C", [5, 6])):
        folder = finished.path(f"merged/{part}_merged")
        assert sorted(p.name for p in folder.glob("*.safetensors")) == [f"layer_{i:03d}.safetensors" for i in held]
        assert json.loads((folder / "bundle_meta.json").read_text())["layer_indices"] == held


def test_dropped_activations_are_only_made_again_when_they_are_needed(finished):
    assert finished.jobs("drop_activations") == {"drop_activations": 1}
    assert not list(finished.folder.glob("results/shared/activations/*"))
    assert finished.planned() == {}
    finished.replace_adapter("C", by="other_C")
    again = finished.planned()
    # What C starts from is gone, and what all stages are compared with.
    assert again == {
        "merge_C_5to6": 1, "segment": 6, "dense_perplexity": 1, "perplexity": 6, "summary": 1, "plot_perplexity": 1,
    }  # fmt: skip
