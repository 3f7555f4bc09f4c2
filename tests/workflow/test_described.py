"""What a report says of an experiment, in words."""

import copy

import pytest
from workflow_project import ROOT

from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.described import described
from mistral_prune_lora.workflow.experiment import Experiment

TRAINED = {"A": "train", "B": "train", "C": "train"}


@pytest.fixture
def told(project, monkeypatch):
    """Says what is told of the project's experiment with some changes."""
    monkeypatch.chdir(project.folder)

    def tell(**changes) -> dict[str, str]:
        config = copy.deepcopy(project.config)
        config["experiments"]["tiny"] |= {"distill": {"dataset": "corpus", "seqlen": 16}} | changes
        checked = check_config(config, ROOT / "rules/config.schema.yaml")
        return described(Experiment.of(checked, "tiny", Content(project.folder / "digests.json")))

    return tell


def test_given_adapters_and_what_is_measured(told, project):
    assert told() == {
        "model": "dense, 8 layers",
        "layers": "A 0-2, 7; B 3-4; C 5-6",
        "adapters": "A given, adapters/A; B given, adapters/B; C given, adapters/C",
        "measured on": "corpus, windows of 32 tokens, fp32",
    }
    measured = project.config["experiments"]["tiny"]["perplexity"] | {"variants": ["dense", "pruned"]}
    assert told(perplexity=measured).keys() == {"model", "layers", "measured on"}, "nothing is healed"


def test_each_part_s_adapter_is_told_by_what_it_is(told):
    said = told(restore="exact", adapters={"A": "closed-form", "B": "train", "C": None})
    assert said["adapters"] == "A in closed form; B trained here; C left as it was cut"
    assert said["restore"].startswith("exact, each bundle puts the original weights back")
    assert said["trained on"] == "corpus, all windows of 16 tokens, forward_kl with weight 0.9"
    # B puts A's weights back and is merged for it, and C, which has nothing to put back, is not.
    said = told(restore="exact", adapters={"A": "adapters/A", "B": None, "C": None})
    assert said["adapters"] == "A given, adapters/A; B left as it was cut; C left as it was cut"


def test_what_trainings_start_from_and_stages_that_share_an_adapter(told):
    distill = {"dataset": "corpus", "seqlen": 16}
    said = told(adapters=TRAINED, distill=distill | {"start": {"A": "closed-form"}})
    assert said["adapters"] == "A trained here from its closed form; B trained here; C trained here"
    assert "restore" not in said
    said = told(adapters=TRAINED | {"C": None}, restore="shared", distill=distill | {"stages": {"A": 2, "FULL": 1}})
    assert said["adapters"] == "A trained here; B trained here; C left as it was cut"
    assert said["restore"] == "shared, A's adapter is trained for A, FULL at once"
