"""One adapter trained by several processes of a job, as a profile may ask for it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from workflow_project import ROOT

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.workflow.together import shared_settings, start_together

CURVE = "results/tiny/adapters/B_lora/training.csv"
OPTIMISER = {"steps": 3, "batch_size": 1, "gradient_accumulation": 2, "warmup_steps": 0, "learning_rate": 0.01}


@pytest.fixture
def trained(project):
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"]["B"] = "train"
    experiment["distill"] = {
        "dataset": "corpus", "seqlen": 32, "windows": 6, "dtype": "fp32", "lora": {"rank": 2, "dropout": 0.0},
        "parts": {"B": OPTIMISER},
    }  # fmt: skip
    return project


def test_two_processes_make_the_updates_of_one(trained, monkeypatch):
    where = (trained.folder / CURVE).parent
    trained.snakemake(CURVE)
    alone = pd.read_csv(where / "training.csv")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    asked = ("--set-resources", "train_adapter:processes=2", "train_adapter:gpu=0", "--retries", "0")
    assert trained.planned(CURVE, *asked) == {}
    trained.snakemake(CURVE, "--forcerun", "train_adapter", *asked)
    pd.testing.assert_frame_equal(pd.read_csv(where / "training.csv"), alone, check_exact=False, rtol=1e-4)
    assert json.loads((where / "training.json").read_text())["processes"] == 2
    log = next((trained.folder / "logs/train_adapter").glob("*.log")).read_text()
    assert log.count("device cpu, 1 thread,") == 1


def test_more_processes_than_passes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(PipelineError, match="6 forward passes cannot be shared by 4 processes"):
        shared_settings({"optimiser": {"gradient_accumulation": 6}})


@pytest.mark.parametrize(
    ("processes", "environment", "told"),
    [(2, {}, "are for Slurm"), (2, {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}, "the job has 2 nodes")],
)
def test_what_cannot_be_started_is_refused(processes, environment, told, monkeypatch):
    for name in ("RANK", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=told):
        start_together(processes)


def test_a_job_that_asks_for_nothing_works_alone_in_an_allocation_of_several_nodes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    start_together(None)


SAVES = """
import os, pathlib, signal, sys, time
from mistral_prune_lora.workflow.together import start_together
start_together(2)
here, rank = pathlib.Path(__file__).parent, os.environ["RANK"]
def save(number, frame):
    time.sleep(1)
    (here / f"saved.{rank}").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
(here / f"ready.{rank}").touch()
time.sleep(60)
"""


def test_who_asks_the_job_to_end_asks_its_processes_and_the_job_waits_for_them(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SAVES)
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    env |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "PYTHONPATH": str(ROOT / "lib")}
    with subprocess.Popen([sys.executable, script], env=env, stderr=subprocess.DEVNULL) as job:
        until = time.monotonic() + 100
        while len(list(tmp_path.glob("ready.*"))) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        code = job.wait(60)
        assert sorted(path.name for path in tmp_path.glob("saved.*")) == ["saved.0", "saved.1"]
    assert code > 0


def offered() -> dict:
    """What the Slurm profile offers in a comment."""
    text = (ROOT / "profiles/slurm/config.yaml").read_text()
    block = text[text.index("# set-resources:") :]
    return yaml.safe_load(re.sub(r"^# ", "", block, flags=re.MULTILINE))


def test_what_the_profile_offers_is_taken_by_snakemake_and_by_slurm_s_executor(trained):
    folder = trained.folder / "profile"
    folder.mkdir()
    settings = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text()) | offered()
    settings["report-stylesheet"] = str(ROOT / "profiles/default/report.css")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    printed = trained.snakemake("--dry-run", "--workflow-profile", str(folder))
    told = re.search(r"\ncheckpoint train_adapter:.*?\n\s+resources: (.*?)\n", printed, re.DOTALL)[1]
    found = dict(each.split("=", 1) for each in told.split(", "))
    asked = offered()["set-resources"]["train_adapter"]
    assert {key: found.get(key) for key in asked} == {key: str(value).strip("'") for key, value in asked.items()}
    command = submitted({key: int(value) if value.isdigit() else value for key, value in found.items()})
    wanted = {"--nodes=2", "--ntasks=2", "--gpus=8", "--gpus-per-node=4", "--cpus-per-task=32"}
    assert wanted <= set(command.split()) and "--ntasks-per-gpu" not in command


def submitted(resources: dict) -> str:
    """How the executor asks Slurm for such a job."""

    class Resources(dict):
        __getattr__ = dict.__getitem__

    job = SimpleNamespace(resources=Resources(resources), threads=2, is_group=lambda: False)
    about = dict.fromkeys(("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir"), "")
    return get_submit_command(job, about) + set_gres_string(job)
