"""The whole workflow as Slurm jobs, where a Slurm answers; elsewhere the dry run of the profile has to do."""

import shutil
import subprocess

import pandas as pd
import pytest
from workflow_project import ROOT


def missing() -> str | None:
    """Why there is no cluster to test on, or None."""
    if shutil.which("sinfo") is None:
        return "no Slurm client on this machine"
    nodes = subprocess.run(["sinfo", "--noheader", "--format=%t %G"], capture_output=True, text=True, timeout=30)
    if nodes.returncode != 0 or not nodes.stdout.strip():
        return "no Slurm controller answers"
    return None if "gpu" in nodes.stdout else "no node of this cluster has a GPU (a fake one will do)"


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_every_rule_runs_as_a_slurm_job_with_what_the_profile_asks_for(project):
    arguments = ["--workflow-profile", str(ROOT / "profiles/slurm"), "--slurm-init-seconds-before-status-checks", "5"]
    ran = project.jobs(*arguments)
    assert ran["segment"] == 6 and ran["merge_A"] == 1
    assert len(pd.read_csv(project.folder / "results/summary.csv")) == 7
    logs = list((project.folder / ".snakemake/slurm_logs").rglob("*.log"))
    assert logs == [] or all("rule_" in str(log) for log in logs)  # logs of jobs that went well are tidied away
    assert project.jobs(*arguments) == {}
