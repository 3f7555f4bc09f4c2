"""What runs, and what does not run again: snakemake on a tiny project, for real."""

import json
import os

import pandas as pd
from safetensors import safe_open
from trainers import count_from_zero, with_aliases

STAGES = ("A", "AB", "FULL")
EVERYTHING = {
    "prune": 1,
    "merge_A": 1,
    "merge_B": 1,
    "merge_C": 1,
    "eval_windows": 1,
    "segment": 6,
    "dense_perplexity": 1,
    "perplexity": 6,
    "summary": 1,
    "plot_perplexity": 1,
}


def result(project, variant, stage):
    return json.loads(project.path(f"ppl/corpus/{variant}.{stage}.json").read_text())


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
    assert finished.jobs() == {"merge_C": 1, "segment": 1, "perplexity": 1, "summary": 1, "plot_perplexity": 1}
    after = {stage: result(finished, "merged", stage)["ppl"] for stage in STAGES}
    assert after["A"] == before["A"] and after["AB"] == before["AB"] and after["FULL"] != before["FULL"]

    finished.replace_adapter("B", by="other_B")
    assert finished.jobs() == {"merge_B": 1, "segment": 2, "perplexity": 2, "summary": 1, "plot_perplexity": 1}
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
    assert finished.planned() == {
        rule: n for rule, n in EVERYTHING.items() if rule not in ("prune", "merge_A", "merge_B", "merge_C")
    }
    perplexity["windows"] = 6
    perplexity["compare_with_dense"] = False
    assert finished.planned() == {"perplexity": 6, "summary": 1, "plot_perplexity": 1}
    perplexity["compare_with_dense"] = True
    tokenizer = finished.folder / "dense/tokenizer.json"
    times = tokenizer.stat()
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert {"eval_windows", "prune"} <= set(finished.planned())
    tokenizer.write_text(tokenizer.read_text()[:-1])
    os.utime(tokenizer, ns=(times.st_atime_ns, times.st_mtime_ns))
    # Another profile value or number of cores is no reason to compute anything again.
    assert finished.planned("--set-resources", "segment:mem_mb=3000", "merge_A:gpu=0") == {}


def test_another_dtype_of_the_merged_parts_merges_them_again(finished):
    finished.config["experiments"]["tiny"]["merge"] = {"output_dtype": "fp16"}
    assert finished.planned() == {
        rule: n for rule, n in EVERYTHING.items() if rule not in ("prune", "eval_windows", "dense_perplexity")
    } | {"segment": 3, "perplexity": 3}
    assert finished.jobs("results/tiny/merged/B_merged/merge.json") == {"merge_B": 1}
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
    assert not list(finished.path("").glob("activations/**/*.safetensors"))
    assert finished.planned() == {}
    finished.replace_adapter("C", by="other_C")
    again = finished.planned()
    # What C starts from is gone, and what all stages are compared with.
    assert again["merge_C"] == 1 and again["segment"] == 6 and again["dense_perplexity"] == 1
    assert "merge_A" not in again and "prune" not in again


def test_two_experiments_with_other_layers_share_one_summary(project):
    experiments = project.config["experiments"]
    experiments["other"] = {
        **experiments["tiny"],
        "layers": {"B": [2, 4], "C": [6]},
        "adapters": {"A": "adapters/A", "B": "adapters/B", "C": "adapters/C"},
    }
    experiments["other"]["perplexity"] = {**experiments["tiny"]["perplexity"], "variants": ["pruned"]}
    experiments["tiny"]["perplexity"] = experiments["other"]["perplexity"]
    project.jobs("results/summary.csv")
    table = pd.read_csv(project.folder / "results/summary.csv")
    assert table.groupby("experiment").active_layers.apply(list).to_dict() == {"other": [5, 7, 8], "tiny": [4, 6, 8]}
    full = table[table.stage == "FULL"].ppl
    assert full.nunique() == 1  # both are the dense model


def test_adapters_are_trained_on_what_stands_before_them(project):
    experiment = project.config["experiments"]["tiny"]
    optimiser = {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "warmup_steps": 0}
    experiment["adapters"] = {"A": "train", "B": "train", "C": "train"}
    experiment["perplexity"]["variants"] = ["merged"]
    experiment["distill"] = {
        "dataset": "corpus",
        "seqlen": 32,
        "windows": 8,
        "dtype": "fp32",
        "share_teacher_states": True,
        "lora": {"rank": 2},
        "parts": {part: optimiser for part in "ABC"},
    }
    trained = {"train_windows": 1, "teacher_states": 1, "train_adapter": 3}
    measured = {"segment": 3, "perplexity": 3}
    everything = EVERYTHING | trained | measured
    del everything["dense_perplexity"]
    assert project.jobs() == everything
    for part, held in (("A", {0, 1, 2, 7}), ("B", {3, 4}), ("C", {5, 6})):
        with safe_open(project.path(f"adapters/{part}_lora/adapter_model.safetensors"), "pt") as adapter:
            assert {int(name.split(".layers.")[1].split(".")[0]) for name in adapter.keys()} == held  # noqa: SIM118

    # Another C adapter of one's own: nothing is trained again.
    experiment["adapters"]["C"] = "adapters/C"
    assert project.planned() == {"merge_C": 1, "segment": 1, "perplexity": 1, "summary": 1, "plot_perplexity": 1}
    # Other training of B: what is trained on B runs again too.
    experiment["adapters"]["C"] = "train"
    experiment["distill"]["parts"] = {**experiment["distill"]["parts"], "B": {**optimiser, "learning_rate": 0.01}}
    assert project.planned() == {
        "train_adapter": 2, "merge_B": 1, "merge_C": 1, "segment": 2, "perplexity": 2, "summary": 1,
        "plot_perplexity": 1,
    }  # fmt: skip


def test_the_ranking_of_blocks_is_made_on_request(project):
    project.config["experiments"]["tiny"]["importance"] = {
        "dataset": "corpus", "drop": 3, "seqlen": 32, "windows": 4, "dtype": "fp32",
    }  # fmt: skip
    assert project.jobs("results/tiny/importance.csv") == {"importance": 1}
    table = pd.read_csv(project.path("importance.csv"))
    assert table.start.tolist() == [0, 1, 2, 3, 4] and table.recommended.sum() == 1
    assert "svg" in project.path("importance.svg").read_text()[:200]


def test_parts_without_layers_and_variants_that_nobody_wants_are_left_out(project):
    experiment = project.config["experiments"]["tiny"]
    experiment["layers"]["C"] = []
    everything = project.planned()
    assert everything["merge_B"] == 1 and "merge_C" not in everything
    assert project.jobs("results/tiny/ppl/corpus/merged.FULL.json")["merge_B"] == 1
    assert result(project, "merged", "FULL")["active_layers"] == 8
    experiment["perplexity"]["variants"] = ["pruned"]
    del experiment["adapters"]  # nothing is merged, so nothing need be trained
    assert not {"merge_A", "merge_B", "train_adapter"} & set(project.planned())
