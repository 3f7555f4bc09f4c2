"""A dataset of questions through the workflow: windows, the teacher's states, and an adapter that learnt answers."""

import json
from pathlib import Path

from question_rows import save_questions
from workflow_project import ROOT

from mistral_prune_lora.text.windows import Windows
from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.plan import Plan


def test_an_adapter_is_trained_on_answers(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    save_questions(Path("rows"))
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"]["A"] = "train"
    experiment["distill"] = {
        "dataset": "squad",
        "seqlen": 250,
        "windows": 3,
        "dtype": "fp32",
        "share_teacher_states": True,
        "parts": {"A": {"steps": 2, "batch_size": 1, "gradient_accumulation": 1, "warmup_steps": 0}},
    }
    squad = {"dataset": "rows/rows.parquet", "split": "train", "shape": "prompt", "preset": "squad", "packing": True}
    project.config["datasets"]["squad"] = squad
    config = json.loads(json.dumps(project.config))
    training = Plan.of(check_config(config, ROOT / "rules/config.schema.yaml"), Content("memory")).experiments["tiny"]
    made = training.training("A")
    project.snakemake(*made.files)
    windows = Windows.load(made.data.windows.file)
    assert (len(windows), windows.identity.examples["examples"]) == (2, 3)
    assert json.loads(Path(made.data.windows.record).read_text()) == windows.identity.content()
    told = json.loads(Path(made.folder, "training.json").read_text())
    assert told["windows"]["scored_sha256"] == windows.scored_sha256
