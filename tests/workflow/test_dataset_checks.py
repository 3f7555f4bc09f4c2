"""Datasets of examples in a configuration: what cannot be is refused before the first job, and nothing sound is."""

import json
from pathlib import Path

import pytest
from question_rows import ROWS, save_questions

from mistral_prune_lora.workflow.checks import check_inputs
from mistral_prune_lora.workflow.configuration import ConfigError, check_config
from mistral_prune_lora.workflow.content import Content, short_key
from mistral_prune_lora.workflow.plan import Plan

SCHEMA = Path(__file__).parents[2] / "rules" / "config.schema.yaml"
COMMIT = "7b6d24c440a36b6815f21b70d25016731768db1f"


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    save_questions(Path("rows"))
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"] = dict.fromkeys("ABC", "train")
    experiment["distill"] = {"dataset": "squad", "seqlen": 64, "windows": 4}
    return project


def with_dataset(project, **dataset):
    squad = {"dataset": "rows/rows.jsonl", "split": "train", "shape": "prompt", "preset": "squad"}
    project.config["datasets"]["squad"] = {k: v for k, v in {**squad, **dataset}.items() if v is not None}
    return check_config(project.config, SCHEMA)


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.parquet", "train-v2.0.json", "spread.json"])
def test_sound_datasets_have_no_faults(here, name):
    found = check_inputs(with_dataset(here, dataset=f"rows/{name}", padding_side="left", packing=True))
    assert found.faults == [] and found.warnings == []


def test_the_hub_is_not_asked(here):
    assert check_inputs(with_dataset(here, dataset="rajpurkar/squad", revision=COMMIT)).faults == []


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ({"dataset": "rajpurkar/squad"}, "datasets.squad.dataset: rajpurkar/squad is no file or folder here; of a"),
        ({"preset": None}, "datasets.squad.template: needs exactly one of preset and template"),
        ({"columns": {"context": "passage"}}, "datasets.squad: there is no column 'passage', only 'id', 'title'"),
        ({"shape": "chat", "preset": None}, "datasets.squad: there is no column 'messages', only"),
        ({"documents": "each"}, "datasets.squad.documents: is of texts"),
        ({"split": "train[:2"}, "datasets.squad.split: 'train[:2' names no split"),
        ({"split": "train[:2]", "streaming": True}, "datasets.squad.split: 'train[:2]' cannot be read as a stream"),
        ({"dataset": "rows/nothing.jsonl.txt"}, "datasets.squad.dataset:"),
    ],
)
def test_datasets_that_cannot_be_are_told_with_their_key(here, dataset, told):
    found = check_inputs(with_dataset(here, **dataset)).faults
    assert len(found) == 1 and told in found[0], found


def test_unknown_words_are_the_schema_s(here):
    with pytest.raises(ConfigError) as caught:
        with_dataset(here, preset="squad3", revision="main", padding_side="middle", template={"prompt": "a"})
    for key in ("preset", "revision", "padding_side", "template"):
        assert f"datasets.squad.{key}: " in str(caught.value)


def test_nothing_is_measured_or_ranked_on_examples(here):
    experiment = here.config["experiments"]["tiny"]
    experiment["perplexity"]["datasets"].append("squad")
    experiment["importance"] = {"dataset": "squad", "drop": 2}
    found = check_inputs(with_dataset(here)).faults
    assert len(found) == 2 and all(
        "squad is of the shape prompt, of which not every token is scored" in f for f in found
    )
    assert {f.split(":")[0] for f in found} == {
        "experiments.tiny.perplexity.datasets",
        "experiments.tiny.importance.dataset",
    }


def test_a_stream_needs_a_number(here):
    here.config["experiments"]["tiny"]["distill"]["windows"] = None
    (found,) = check_inputs(with_dataset(here, streaming=True)).faults
    assert found.startswith("experiments.tiny.distill.windows: squad is read as a stream")


def test_whatever_decides_the_windows_is_in_their_name(here):
    def name(**dataset):
        experiment = Plan.of(with_dataset(here, **dataset), Content("memory")).experiments["tiny"]
        return experiment.windows("distill", "squad").name

    changes = [
        {},
        {"preset": "squad_v2"},
        {"packing": True},
        {"padding_side": "left"},
        {"split": "train[:3]"},
        {"columns": {"context": "title"}},
        {"preset": None, "template": {"prompt": "{question}", "answer": " {title}"}},
        {"dataset": "rajpurkar/squad", "revision": COMMIT},
        {"dataset": "rajpurkar/squad", "revision": "0" * 40},
        {"dataset": "rajpurkar/squad_v2", "revision": COMMIT},
        {"dataset": "rajpurkar/squad", "revision": COMMIT, "config": "plain_text"},
    ]
    names = [name(**change) for change in changes]
    assert len(set(names)) == len(changes) and name() == names[0]
    Path("rows/rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert name() != names[0]


def test_a_plain_text_s_name_is_what_it_was_before_there_were_shapes(here):

    plan = Plan.of(with_dataset(here), Content("memory"))
    for score in plan.scores.values():
        made = score.windows
        recipe = {
            "model": made.model.identity,
            "text": made.text,
            "split": made.dataset["split"],
            "column": made.dataset["column"],
            "seqlen": made.seqlen,
            "count": made.count,
        }
        assert made.name == f"{made.seqlen}-{short_key(recipe)}"
