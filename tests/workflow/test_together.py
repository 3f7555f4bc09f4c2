"""One adapter trained by several processes of a job, as a profile may ask for it."""

import json
import os
import re
import shutil
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

SAVES = ROOT / "tests/support/saves_when_asked.py"
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


@pytest.fixture
def slurm_job(monkeypatch):
    """As in a job of Slurm, where its executor has taken away what the environment says of the job's nodes."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "20517")


def test_processes_outside_of_slurm_are_refused(slurm_job, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(PipelineError, match="are for Slurm"):
        start_together(2)


@pytest.mark.parametrize("mpi", [None, "mpirun -np 2"])
def test_several_nodes_without_an_srun_that_starts_processes_there_are_refused(mpi, slurm_job):
    with pytest.raises(PipelineError, match="the job has 2 nodes, and no srun starts processes on them"):
        start_together(None, 2, mpi)


def test_an_array_whose_jobs_have_mpi_is_refused(slurm_job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(PipelineError, match="the first job of an array in all of them"):
        start_together(2, 2, "srun")


def test_a_job_that_asks_for_nothing_works_alone(slurm_job):
    start_together(None, None, "srun")
    start_together(1, 1)


SCONTROL = """#!/bin/sh
case "$2 $3" in
    "job 20517") echo "JobId=20517 ReqNodeList=(null) ExcNodeList=(null) NodeList=gpu[07-08] BatchHost=gpu07" ;;
    "hostnames gpu[07-08]") printf 'gpu07\\ngpu08\\n' ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def two_nodes(slurm_job, tmp_path, monkeypatch):
    """A Slurm that says the job has two nodes, and an srun that keeps what it is to start."""
    for name, text in {"scontrol": SCONTROL, "srun": f'#!/bin/sh\necho "$@" > {tmp_path}/started\nexit 3\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_torchrun_is_started_on_every_node_and_meets_on_the_first(two_nodes, keeps_signals):
    with pytest.raises(SystemExit) as ended:
        start_together(4, 2, "srun --label")
    assert ended.value.code == 3
    by_node, command = (two_nodes / "started").read_text().split(sys.executable)
    assert by_node.split() == [
        "--label",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=600",
    ]
    wanted = {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=gpu07:20517", "--rdzv_id=20517"}
    assert wanted <= set(command.split()) and "--standalone" not in command


def test_other_nodes_than_the_job_asked_for_are_refused(two_nodes):
    with pytest.raises(PipelineError, match="the job has the nodes gpu07, gpu08, and asked for 3"):
        start_together(4, 3, "srun")


def test_a_slurm_that_does_not_answer_is_named(two_nodes, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(PipelineError, match="Slurm does not say which nodes the job has"):
        start_together(4, 2, "srun")


@pytest.fixture
def keeps_signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_who_asks_the_job_to_end_asks_its_processes_and_the_job_waits_for_them(slurm_job, tmp_path):
    script = shutil.copy(SAVES, tmp_path)
    env = os.environ | {"NODES": "1", "PYTHONPATH": str(ROOT / "lib")}
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
