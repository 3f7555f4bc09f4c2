"""Layers chosen in one run and taken by the next: what waits, what is refused, and what runs again."""

import copy
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from cut_model import save_dense
from workflow_project import ROOT

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.workflow import needs
from mistral_prune_lora.workflow.choice import choices
from mistral_prune_lora.workflow.chosen import waiting
from mistral_prune_lora.workflow.configuration import ConfigError, check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.expansion import expand_experiments
from mistral_prune_lora.workflow.plan import Plan

CHOOSE = {"dataset": "corpus", "drop": 4, "seqlen": 32, "windows": 4, "batch_size": 2, "dtype": "fp32"}
CHOICE = "results/tiny/choice.json"


@pytest.fixture
def choosing(project):
    """The project, whose experiment takes the layers that it chooses itself; nothing is merged."""
    experiment = project.config["experiments"]["tiny"]
    experiment |= {"choose": dict(CHOOSE), "layers": {"choice": CHOICE}}
    experiment["perplexity"] |= {"variants": ["pruned"], "stages": ["A"], "compare_with_dense": False}
    return project


def checked(project):
    return check_config(copy.deepcopy(project.config), ROOT / "rules/config.schema.yaml")


def test_layers_are_chosen_in_one_run_and_taken_by_the_next(choosing):
    told = choosing.snakemake("--dry-run", succeeds=False)
    assert f"there is no {CHOICE}; run `snakemake {CHOICE} --cores N` first" in told
    assert choosing.jobs(CHOICE) == {"windows": 1, "choose": 1}
    record = json.loads(choosing.path("choice.json").read_text())
    table = pd.read_csv(choosing.path("choice.csv"))
    assert (table.kind == "block").sum() == 4 and table.chosen.sum() == 2
    assert "svg" in choosing.path("choice.svg").read_text()[:200]
    jobs = choosing.jobs()
    assert [name for name in jobs if name.startswith("prune_")] and "choose" not in jobs
    summary = pd.read_csv(choosing.folder / "results/summary.csv")
    block = table[(table.kind == "block") & table.chosen].iloc[0]
    assert summary.active_layers.tolist() == [4]
    manifest = json.loads(choosing.path("pruning/A/manifest.json").read_text())
    assert manifest["stages"]["A"]["dropped_layers"] == record["dropped"] == [*map(int, block.dropped.split())]
    assert manifest["stages"]["B"]["removed_layers"] == record["B"]
    # With other settings it is not what this configuration would choose, and nothing is measured with it.
    choosing.config["experiments"]["tiny"]["choose"]["drop"] = 3
    assert "was chosen with other settings" in choosing.snakemake("--dry-run", succeeds=False)


@pytest.fixture
def chosen(choosing, monkeypatch):
    """A choice as a command would have written it, in the project's folder."""
    monkeypatch.chdir(choosing.folder)
    del choosing.config["experiments"]["tiny"]["choose"]
    choosing.config["experiments"]["tiny"]["layers"]["choice"] = "choice.json"
    content = Content("digests.json")
    files = {name: content.sha256(f"dense/{name}") for name in ("config.json", "model.safetensors")}
    told = {"command": "choose_layers", "num_layers": 8, "B": [3], "C": [4, 5], "model": {"files": files}, "made": None}
    Path("choice.json").write_text(json.dumps(told))
    return choosing


def test_what_a_command_chose_is_taken_for_its_own_model_alone(chosen):
    config = checked(chosen)
    assert waiting(config, {}) == {}
    layout = Plan.of(config, Content("digests.json")).experiments["tiny"].layout
    assert (layout.b, layout.c) == ((3,), (4, 5))
    shutil.rmtree("dense")
    save_dense(Path("dense"), seed=5, vocab_size=259)
    with pytest.raises(PipelineError, match=r"chosen for another model, whose (config.json|model.safetensors) differs"):
        Plan.of(config, Content("digests.json"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_layers": 9}, "layers.choice: was made for a model of 9 layers, the model has 8"),
        ({"B": ["3"]}, "is not what choosing layers wrote"),
        ({"B": [4]}, "stand more than once in B and C"),
        ({"command": "prune"}, "is not what choosing layers wrote"),
    ],
)
def test_a_choice_that_is_none_or_does_not_fit_is_a_mistake(chosen, changes, told):
    file = Path("choice.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConfigError, match=told):
        checked(chosen)


def test_layers_are_named_or_chosen_and_an_experiments_own_go_before_those_it_is_like(chosen):
    experiments = chosen.config["experiments"]
    experiments["named"] = {"like": "tiny", "layers": {"B": [1], "C": [2]}}
    experiments["again"] = {"like": "named", "layers": {"choice": "choice.json"}}
    config = check_config(expand_experiments(chosen.config).config, ROOT / "rules/config.schema.yaml")
    plan = Plan.of(config, Content("digests.json"))
    assert [plan.experiments[name].layout.b for name in ("tiny", "named", "again")] == [(3,), (1,), (3,)]
    experiments["again"]["layers"] = {"choice": "choice.json", "B": [1], "C": [2]}
    with pytest.raises(ConfigError, match="needs either B and C or choice"):
        check_config(expand_experiments(chosen.config).config, ROOT / "rules/config.schema.yaml")


def test_a_choice_is_named_by_all_that_decides_it_and_an_unused_section_changes_nothing(choosing, monkeypatch):
    monkeypatch.chdir(choosing.folder)
    experiments, content = choosing.config["experiments"], Content("digests.json")
    experiments["tiny"]["layers"] = {"B": [3, 4], "C": [5, 6]}
    first = choices(checked(choosing), content)["tiny"]
    for changes in ({"drop": 3}, {"race": 2}, {"dtype": "bf16"}, {"windows": 3}, {"splits": "all"}, {"b_sizes": [1]}):
        experiments["tiny"]["choose"] = CHOOSE | changes
        assert choices(checked(choosing), content)["tiny"].name != first.name
    with_choice = Plan.of(checked(choosing), content)
    del experiments["tiny"]["choose"]
    without = Plan.of(checked(choosing), content)
    assert without.choices == {} and without.files == with_choice.files
    assert needs.of_choice(first).mem_mb > 800
    experiments["tiny"]["choose"] = CHOOSE | {"drop": 8}
    with pytest.raises(ConfigError, match=r"experiments\.tiny\.choose: .*8 of 8 layers cannot be dropped"):
        checked(choosing)
