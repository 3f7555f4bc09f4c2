"""`restore: exact`: what is planned, and by snakemake for real: FULL is computed, and is the dense model."""

import copy

import pandas as pd
import pytest
import torch
from cut_model import random_windows
from workflow_project import ROOT

from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.workflow.configuration import ConfigError, check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.experiment import Experiment

SCHEMA = ROOT / "rules/config.schema.yaml"


def test_full_is_the_dense_model(finished):
    experiment = finished.config["experiments"]["tiny"]
    experiment |= {"restore": "exact", "adapters": experiment["adapters"] | {"C": None}}
    experiment["perplexity"] |= {"variants": ["dense", "merged"], "stages": ["AB", "FULL"], "compare_with_dense": True}
    finished.config["report"] = True
    jobs = finished.jobs()
    assert (jobs["merge_B_3to4_undo"], jobs["merge_C_5to6_undo"]) == (1, 1)
    assert (jobs["strength"], jobs["report_pages"]) == (2, 1), "C has no adapter, whose strength could be told"
    assert not {"merge_A", "prune_B3to4_C5to6", "windows", "dense_perplexity"} & jobs.keys()  # as they were
    table = pd.read_csv(finished.folder / "results/summary.csv").set_index(["variant", "stage"])
    dense, full = table.loc["dense", "FULL"], table.loc["merged", "FULL"]
    assert full.mean_nll == dense.mean_nll and full.weights_sha256 == dense.weights_sha256
    assert full.kl_dense == 0 and full.top1_agreement == 1 and table.kl_dense["merged", "AB"] > 0
    # The first page must not say that the adapters stay merged.
    assert "not the dense model" not in (finished.folder / "results/report/front.html").read_text()
    a, *bundles = [finished.path(f"merged/{part}_merged") for part in "ABC"]
    with torch.inference_mode():
        ids = random_windows(2, 12).ids.long()
        ours = load_model(a, dtype=torch.float32, bundles=tuple(bundles))(ids).logits
        assert torch.equal(ours, load_model(finished.folder / "dense", dtype=torch.float32)(ids).logits)


@pytest.fixture
def exact(project, monkeypatch):
    """An experiment of which A is healed in closed form, and B trained; and what changes it."""
    monkeypatch.chdir(project.folder)
    experiment = project.config["experiments"]["tiny"]
    experiment |= {"restore": "exact", "adapters": {"A": "closed-form", "B": "train", "C": None}}
    experiment |= {"baselines": ["no-kd", "joint-FULL"], "distill": {"dataset": "corpus", "seqlen": 32}}

    def planned(**changes) -> Experiment:
        config = copy.deepcopy(project.config)
        config["experiments"]["tiny"] |= changes
        content = Content(project.folder / "digests.json")
        return Experiment.of(check_config(config, SCHEMA), "tiny", content)

    return planned


def test_what_an_exact_experiment_is_made_of(exact):
    planned = exact()
    training = planned.training("B")
    assert training.student == planned.part("pruned", "A") and training.bundles == (planned.part("pruned", "B"),)
    assert planned.merge("B").undoes == (planned.part("pruned", "A"), planned.part("merged", "A"))
    assert planned.merge("C").undoes == (planned.part("pruned", "B"), planned.part("merged", "B"))
    assert planned.merge("C").adapter is None and planned.merge("B", "no-kd").undoes
    assert not planned.merge("A").undoes and not planned.merge("B", "joint-FULL").undoes
    # The closed form changes layer 2 alone: what lies before it is run once for all stages.
    runs = {run.name.rsplit("-", 1)[0]: run for run in planned.measuring.shared_runs("merged", "corpus")}
    assert list(runs) == ["A000-001_A", "A002-002_AB", "B003-004_AB", "B003-004_FULL", "C005-006_FULL"]
    assert [len(run.restores) for run in runs.values()] == [0, 2, 0, 3, 0]
    # Without layers of B, it is C that puts A's weights back.
    alone = exact(layers={"B": [], "C": [5, 6]}, baselines=[], adapters={"A": "train", "C": None})
    assert alone.merge("C").undoes == (alone.part("pruned", "A"), alone.part("merged", "A"))
    healed = exact(adapters={"A": None, "B": "train", "C": None}, baselines=[])
    assert healed.part("merged", "A") == healed.part("pruned", "A") and not healed.merge("B").undoes


def test_without_it_nothing_is_put_back(exact):
    adapters = {part: f"adapters/{part}" for part in "ABC"}
    before = exact(restore="sequential", adapters=adapters, baselines=[])
    assert [merge.rule for merge in before.merges] == ["merge_A", "merge_B_3to4", "merge_C_5to6"]
    assert not any(run.restores for run in before.measuring.scores().values())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adapters": {"A": "train", "B": "train", "C": "train"}}, "adapters.C: with restore: exact, C needs none"),
        ({"layers": {"B": [3], "C": []}}, "adapters.B: with restore: exact, B needs none"),
        ({"adapters": {"A": None, "B": None, "C": None}}, "adapters: all are null"),
        ({"merge": {"output_dtype": "fp32"}}, "merge.output_dtype: with restore: exact"),
        ({"restore": "sequential"}, "adapters.C: null is for restore: exact"),
        ({"restore": "both"}, "restore: 'both' is not one of"),
    ],
)
def test_contradictions_are_told(exact, changes, told):
    with pytest.raises(ConfigError, match=told):
        exact(baselines=[], **changes)
