"""The workflow as jobs of a Slurm: what they ask for and make, and what becomes of those that do not end well."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from slurm_node import BOTH
from slurm_project import Running, job_state, jobs, on_slurm, rule_of, signal, wait_until
from workflow_project import ROOT, Project, configuration, copied

from mistral_prune_lora.storage.journal import open_held
from mistral_prune_lora.workflow import needs
from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.plan import Plan

pytestmark = pytest.mark.usefixtures("cluster")
OPTIMISER = {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "warmup_steps": 0, "learning_rate": 0.01}


def two_layouts(base: dict) -> dict:
    """Two layouts. The first is healed, A in closed form and B by training, and measured; the second is only measured,
    its windows shared."""
    config = copy.deepcopy(base) | {"report": True}
    first = config["experiments"].pop("tiny")
    first["layers"]["C"] = []
    first["adapters"] = {"A": "closed-form", "B": "train", "C": "train"}
    first["distill"] = {
        "dataset": "corpus", "seqlen": 32, "windows": 8, "dtype": "fp32", "share_teacher_states": True,
        "share_prefix_states": True, "lora": {"rank": 2}, "parts": {part: OPTIMISER for part in "ABC"},
    }  # fmt: skip
    first["importance"] = {"dataset": "corpus", "drop": 2, "seqlen": 32, "windows": 4, "dtype": "fp32"}
    first["closed_form"] = {"seqlen": 32, "windows": 6, "held_out": 2, "dtype": "fp32"}
    first["choose"] = {"dataset": "corpus", "drop": 2, "seqlen": 32, "windows": 4, "dtype": "fp32"}
    measured = first["perplexity"] | {"batch_size": 2}
    first["perplexity"] = measured | {"variants": ["merged"], "stages": ["AB"], "compare_with_dense": False}
    second = {
        "model": "dense",
        "layers": {"B": [7], "C": []},
        "perplexity": measured | {"variants": ["dense", "pruned"], "stages": ["AB"]},
    }
    config["experiments"] = {"first": first, "second": second}
    return config


def sharded(config: dict) -> dict:
    config = copy.deepcopy(config)
    config["experiments"]["second"]["perplexity"]["shards"] = 2
    config["experiments"]["first"]["distill"]["shards"] = 2
    return config


SAVES = ROOT / "tests/support/saves_when_asked.py"
TARGETS = (
    "all", "results/first/importance.csv", "results/first/choice.json", "results/first/exported/merged.AB/config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def ran(cluster, assets, tmp_path_factory) -> tuple[Project, Project, list[dict[str, str]], list[str]]:
    """Everything on the cluster, while one job hangs and the node is drained for a while; and on this machine alone.

    Returns the project, that of this machine, what Slurm says of the jobs in the end, and why jobs waited meanwhile.
    """
    folder = tmp_path_factory.mktemp("slurm-run") / "project"
    shutil.copytree(assets, folder)
    project = Project(folder, sharded(two_layouts(configuration())))
    here = copied(project, folder.with_name("here"))
    here.config = unsharded(project.config)
    run = Running(project, *TARGETS, *on_slurm(resources=["importance:runtime=attempt"]))
    on_one_machine = Running(here, *TARGETS)
    hanging = run.until(lambda: [job for job in jobs("importance") if job["JobState"] == "RUNNING"])[0]
    log = project.folder / "logs/importance/first.log"
    run.until(lambda: log.exists() and "device cpu" in log.read_text())
    signal(hanging, "STOP")
    node = hanging["NodeList"]
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"], check=True)
    waiting = run.until(lambda: [j["Reason"] for j in jobs() if "DRAINED" in j["Reason"]])
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=True)
    run.end()
    on_one_machine.end()
    return project, here, jobs(), waiting


def test_every_job_asks_for_what_its_model_needs(ran, monkeypatch):
    project, _, asked, _ = ran
    monkeypatch.chdir(project.folder)
    config = check_config(yaml.safe_load(yaml.safe_dump(project.config)), ROOT / "rules/config.schema.yaml")
    plan = Plan.of(config, Content("digests.json"))
    made = {
        **{f"{p.rule}_wildcards_{name}": needs.of_pruning(p) for name, p in plan.prunings.items()},
        **{f"{m.rule}_wildcards_{name}": needs.of_merge(m) for name, m in plan.merges.items()},
        **{f"{t.rule}_wildcards_{name}": needs.of_training(t) for name, t in plan.trainings.items()},
        **{f"windows_wildcards_{name}": needs.of_windows() for name in plan.windows},
        **{f"closed_form_wildcards_{name}": needs.of_closed_form(c) for name, c in plan.closed_forms.items()},
        **{f"choose_wildcards_{name}": needs.of_choice(c) for name, c in plan.choices.items()},
        **{f"strength_wildcards_{name}": needs.of_strength(m) for name, m in plan.merges.items()},
        **wanted("segment", plan.segments, needs.of_segment),
        **wanted("dense_perplexity", {n: s for n, s in plan.scores.items() if s.keeps}, needs.of_score),
        **wanted("perplexity", {n: s for n, s in plan.scores.items() if not s.keeps}, needs.of_score),
        **wanted("teacher_states", plan.teachers, needs.of_teacher),
        **wanted("prefix_states", plan.prefixes, needs.of_prefix),
    }
    found = {rule_of(job): job for job in asked if not rule_of(job).startswith("importance")}
    assert found.keys() >= made.keys()
    for name, need in made.items():
        hours, minutes, _ = map(int, found[name]["TimeLimit"].split(":"))
        memory = float(found[name]["MinMemoryNode"].rstrip("MG")) * (1024 if "G" in found[name]["MinMemoryNode"] else 1)
        assert (60 * hours + minutes, round(memory)) == (need.runtime, need.mem_mb), name
        computes = need.gpu or name.startswith("merge")
        assert found[name]["NumCPUs"] == ("2" if computes else "1"), name
    assert found["export_stage_wildcards_first_merged_AB"]["JobState"] == "COMPLETED"
    assert len({p.name for p in plan.prunings.values()}) == 2


def wanted(rule: str, artefacts: dict, need) -> dict:
    """What the jobs of a rule ask for, by what Slurm knows them as; where windows are shared, the shards' too."""
    asked = {}
    for name, made in artefacts.items():
        if made.shards == 1:
            asked[f"{rule}_wildcards_{name}"] = need(made)
            continue
        asked[f"{rule}_wildcards_{name}"] = needs.of_gathering(made)
        for number in range(1, made.shards + 1):
            told = f"{rule}_shard_wildcards_{name}_{number}-of-{made.shards}"
            asked[told] = need(made, made.shards)
    return asked


def test_the_numbers_are_those_of_one_machine_to_the_last_digit(ran):
    project, here, *_ = ran
    for name in ("summary.csv", "comparisons.csv", "first/importance.csv"):
        assert (here.folder / "results" / name).read_bytes() == (project.folder / "results" / name).read_bytes(), name


def unsharded(config: dict) -> dict:
    config = copy.deepcopy(config)
    for experiment in config["experiments"].values():
        for section in ("distill", "perplexity"):
            experiment.get(section, {}).pop("shards", None)
    return config


def test_a_job_that_its_time_limit_kills_gets_more_time(ran):
    first, second = jobs("importance")
    assert (first["JobState"], first["TimeLimit"]) == ("TIMEOUT", "00:01:00")
    assert (second["JobState"], second["TimeLimit"]) == ("COMPLETED", "00:02:00")


def test_jobs_wait_while_their_node_drains(ran):
    assert ran[3]


@pytest.fixture
def again(ran, tmp_path) -> Project:
    """The project with everything made; its measuring is to be done again, in batches of another size."""
    return remeasured(ran[0], tmp_path / "project")


def remeasured(project: Project, folder: Path) -> Project:
    subprocess.run(["cp", "-a", project.folder, folder], check=True)
    config = unsharded(project.config)
    for experiment in config["experiments"].values():
        experiment["perplexity"]["batch_size"] = 3
    return Project(folder, config)


def test_jobs_side_by_side_have_a_device_each_and_a_failing_one_names_its_log(again):
    run = Running(again, *on_slurm("--retries", "0", "--keep-going", gpus=True))
    printed = run.end(succeeds=False)
    seen = re.findall(r"torch can use none: .* CUDA_VISIBLE_DEVICES is '(\d)' \(in SLURM_JOB_ID", printed)
    assert {*seen} == {"0", "1"}
    assert {job["TresPerJob"] for job in jobs("dense_perplexity")[-1:]} == {"gres:gpu:1"}
    assert re.search(
        r"\ndense_perplexity failed; its log logs/dense_perplexity/dense-\w+\.log ends with:\n    .*", printed
    )


DENSE = "results/tiny/ppl/corpus/dense.FULL.json"


def test_a_main_process_that_is_killed_and_its_job_that_lives_on_leave_whole_and_right_results(project, tmp_path):
    project.snakemake("--until", "windows")
    here = Project(tmp_path / "here", project.config)
    subprocess.run(["cp", "-a", project.folder, here.folder], check=True)
    here.snakemake(DENSE)
    wanted = (here.folder / DENSE).read_bytes()

    journal = project.folder / journal_of_the_dense_model(project)
    held = open_held(journal, "held by the test")  # so that whoever measures the dense model waits, however long
    run = Running(project, DENSE, *on_slurm())
    old = run.until(lambda: who_waits())
    signal(old, "STOP")
    run.process.kill()
    run.process.wait()
    project.snakemake("--unlock")
    run = Running(project, DENSE, *on_slurm())
    run.until(lambda: who_waits(beside=old))
    os.close(held)
    run.end()
    assert job_state(old) == "RUNNING"
    assert (project.folder / DENSE).read_bytes() == wanted
    signal(old, "CONT")
    run.after(lambda: job_state(old) == "COMPLETED")
    assert (project.folder / DENSE).read_bytes() == wanted and not journal.exists()


def journal_of_the_dense_model(project: Project) -> Path:
    """Where a job of its measuring keeps what it has finished; one at a time holds it."""
    config = check_config(yaml.safe_load(yaml.safe_dump(project.config)), ROOT / "rules/config.schema.yaml")
    with contextlib.chdir(project.folder):
        (dense,) = (score for score in Plan.of(config, Content("digests.json")).scores.values() if score.keeps)
    return Path(dense.result).with_name(f".{Path(dense.result).name}.scores")


def who_waits(beside: dict[str, str] | None = None) -> dict[str, str] | None:
    """The running job, another than the one beside, that measures the dense model and says that somebody else does."""
    for job in jobs("dense_perplexity"):
        told, others = Path(job["StdOut"]), beside and job["JobId"] == beside["JobId"]
        running = job["JobState"] == "RUNNING" and not others and told.exists()
        if running and "waiting for it" in told.read_text():
            return job
    return None


@pytest.fixture
def two_nodes() -> str:
    """The partition that has them."""
    told = subprocess.run(["sinfo", "--noheader", "--partition", BOTH, "--format=%D"], capture_output=True, text=True)
    if told.stdout.strip() != "2":
        pytest.skip(f"this Slurm has no partition of two nodes that is called {BOTH}")
    return BOTH


def test_processes_on_two_nodes_train_the_adapter_that_one_trains(project, tmp_path, two_nodes):
    project.config["experiments"]["tiny"]["adapters"]["A"] = "train"
    project.config["experiments"]["tiny"]["distill"] = {
        "dataset": "corpus", "seqlen": 32, "windows": 8, "dtype": "fp32", "lora": {"rank": 2, "dropout": 0.0},
        "parts": {"A": OPTIMISER | {"batch_size": 1, "gradient_accumulation": 4}},
    }  # fmt: skip
    where = project.folder / "results/tiny/adapters/A_lora"
    record = str((where / "training.json").relative_to(project.folder))
    project.snakemake(record, "--until", "windows", "prune_B3to4_C5to6")
    alone = Project(tmp_path / "alone", project.config)
    subprocess.run(["cp", "-a", project.folder, alone.folder], check=True)
    alone.snakemake(record)

    asked = ("processes=2", "mpi=srun", "nodes=2", "tasks=2", "tasks_per_gpu=0", f"slurm_partition={two_nodes}")
    Running(project, record, *on_slurm(resources=[f"train_adapter:{each}" for each in asked])).end()
    (job,) = jobs("train_adapter")[-1:]
    assert job["NumNodes"] == "2" and json.loads((where / "training.json").read_text())["processes"] == 4
    curve, wanted = (pd.read_csv(each.path("adapters/A_lora/training.csv")) for each in (project, alone))
    pd.testing.assert_frame_equal(curve, wanted, check_exact=False, rtol=1e-4)


# As Slurm's executor starts a job with mpi: of what Slurm says of a job in the environment, little is left.
AS_THE_EXECUTOR = """\
unset $(env | grep -o '^SLURM_[A-Z_]*' | grep -vx SLURM_JOB_ID)
export NODES=2 PYTHONPATH={library}
exec {python} {script}
"""


def test_processes_on_two_nodes_see_their_gpus_and_save_what_they_have_when_their_job_is_asked_to_end(
    tmp_path, two_nodes
):
    script, log = shutil.copy(SAVES, tmp_path), tmp_path / "printed"
    run = AS_THE_EXECUTOR.format(library=ROOT / "lib", python=sys.executable, script=script)
    asked = ["--partition", two_nodes, "--nodes=2", "--ntasks=2", "--cpus-per-task=2", "--gpus=4", "--gpus-per-node=2"]
    command = ["sbatch", "--parsable", *asked, "--output", log, "--wrap", run]
    job = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    wait_until(lambda: [file.read_text() for file in tmp_path.glob("ready.*")] == ["0,1"] * 4, log.read_text)
    # To the job's own process, not to what it has started.
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
    wait_until(lambda: job_state({"JobId": job}) == "FAILED", log.read_text)
    assert sorted(path.name for path in tmp_path.glob("saved.*")) == [f"saved.{number}" for number in range(4)]
