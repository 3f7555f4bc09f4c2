"""Experiments of other kinds, by snakemake for real: two at once, trained adapters, a ranking, parts without layers."""

import pandas as pd
from safetensors import safe_open
from workflow_project import EVERYTHING, result


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
    trained = {"windows": 2, "teacher_states": 1, "train_adapter": 3, "plot_training": 1}
    measured = {"segment": 3, "perplexity": 3}
    everything = EVERYTHING | trained | measured
    assert project.jobs() == everything
    for part, held in (("A", {0, 1, 2, 7}), ("B", {3, 4}), ("C", {5, 6})):
        with safe_open(project.path(f"adapters/{part}_lora/adapter_model.safetensors"), "pt") as adapter:
            assert {int(name.split(".layers.")[1].split(".")[0]) for name in adapter.keys()} == held  # noqa: SIM118

    # Another C adapter of one's own: nothing is trained again.
    experiment["adapters"]["C"] = "adapters/C"
    measured = {"segment": 1, "perplexity": 1, "summary": 1, "plot_perplexity": 1}
    assert project.planned() == {"merge_C_5to6": 1, "plot_training": 1, **measured}
    # Other training of B: what is trained on B runs again too.
    experiment["adapters"]["C"] = "train"
    experiment["distill"]["parts"] = {**experiment["distill"]["parts"], "B": {**optimiser, "learning_rate": 0.01}}
    assert project.planned() == {
        "train_adapter": 2, "merge_B_3to4": 1, "merge_C_5to6": 1, "segment": 2, "perplexity": 2, "summary": 1,
        "plot_perplexity": 1, "plot_training": 1,
    }  # fmt: skip


def test_the_ranking_of_blocks_is_made_on_request(project):
    project.config["experiments"]["tiny"]["importance"] = {
        "dataset": "corpus", "drop": 3, "seqlen": 32, "windows": 4, "dtype": "fp32",
    }  # fmt: skip
    assert project.jobs("results/tiny/importance.csv") == {"windows": 1, "importance": 1}
    table = pd.read_csv(project.path("importance.csv"))
    assert table.start.tolist() == [0, 1, 2, 3, 4] and table.recommended.sum() == 1
    assert project.jobs("results/tiny/importance.svg") == {"plot_importance": 1}
    assert "svg" in project.path("importance.svg").read_text()[:200]


def test_parts_without_layers_and_variants_that_nobody_wants_are_left_out(project):
    experiment = project.config["experiments"]["tiny"]
    experiment["layers"]["C"] = []
    everything = project.planned()
    assert everything["merge_B_3to4"] == 1 and not any(rule.startswith("merge_C") for rule in everything)
    assert project.jobs("results/tiny/ppl/corpus/merged.FULL.json")["merge_B_3to4"] == 1
    assert result(project, "merged", "FULL")["active_layers"] == 8
    experiment["perplexity"]["variants"] = ["pruned"]
    del experiment["adapters"]  # nothing is merged, so nothing need be trained
    assert not {"merge_A", "merge_B_3to4", "train_adapter"} & set(project.planned())
