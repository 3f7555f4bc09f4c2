"""A project that runs on a Slurm, and what Slurm says of its jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from workflow_project import ROOT, Project

# Jobs that make use of a GPU compute on the CPU here: those of a test node are none.
ON_THE_CPU = (
    "train_adapter", "teacher_states", "prefix_states", "segment", "segment_shard", "dense_perplexity",
    "dense_perplexity_shard", "perplexity", "perplexity_shard", "teacher_states_shard", "prefix_states_shard",
    "importance", "choose", "closed_form",
)  # fmt: skip
_PROFILE = ("--workflow-profile", str(ROOT / "profiles/slurm"), "--latency-wait", "20")
PROMPT = Path(__file__).with_name("prompt_snakemake.py")
PATIENCE = 900  # seconds; on a busy machine


def on_slurm(*more: str, gpus: bool = False, resources: Sequence[str] = ()) -> list[str]:
    """Arguments of snakemake; `resources` as `--set-resources` takes them."""
    settings = [*([] if gpus else [f"{rule}:gpu=0" for rule in ON_THE_CPU]), *resources]
    return [*_PROFILE, *(["--set-resources", *settings] if settings else []), *more]


class Running:
    """Snakemake on a Slurm, running; its output goes to a file beside the project."""

    def __init__(self, project: Project, *arguments: str) -> None:
        (project.folder / "config.yaml").write_text(yaml.safe_dump(project.config))
        self._file = project.folder.with_name(f"printed-{time.monotonic_ns()}")
        command = [sys.executable, str(PROMPT), "--snakefile", str(project.root / "Snakefile"), "--cores", "2"]
        with open(self._file, "w") as file:
            self.process = subprocess.Popen(
                [*command, *arguments, "--configfile", "config.yaml"],
                cwd=project.folder,
                stdout=file,
                stderr=file,
                env=os.environ | {"PYTHONPATH": str(project.root / "lib")},
            )

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._file.read_text()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def until(self, found: Callable[[], object]) -> object:
        """Wait until something is so, and return it; the run must not end before."""
        return wait_until(found, lambda: self.printed, lambda: not self.over)

    def after(self, found: Callable[[], object]) -> None:
        """Wait until something is so that goes on without it."""
        wait_until(found, lambda: self.printed)

    def end(self, *, succeeds: bool = True) -> str:
        """Wait for its end and return what it printed."""
        code = self.process.wait(timeout=PATIENCE)
        assert (code == 0) == succeeds, self.printed[-8000:]
        return self.printed


def wait_until(
    found: Callable[[], object], printed: Callable[[], str], may_come: Callable[[], bool] = lambda: True
) -> object:
    """Wait until something is so, and return it; fail, with the end of what was printed, once it cannot come."""
    end = time.monotonic() + PATIENCE
    while not (result := found()):
        assert may_come() and time.monotonic() < end, printed()[-8000:]
        time.sleep(0.3)
    return result


def jobs(rule: str = "") -> list[dict[str, str]]:
    """What Slurm says of its jobs, the oldest first: of one rule, or of all."""
    told = subprocess.run(["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=True).stdout
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in told.splitlines() if line.startswith("JobId=")]
    return sorted((job for job in found if rule_of(job).startswith(rule)), key=lambda job: int(job["JobId"]))


def job_state(job: dict[str, str]) -> str:
    """What Slurm says of it now."""
    return next(now["JobState"] for now in jobs() if now["JobId"] == job["JobId"])


def rule_of(job: dict[str, str]) -> str:
    """Its rule and wildcards."""
    return job.get("Comment", "").removeprefix("rule_")


def signal(job: dict[str, str], name: str) -> None:
    """Send a signal to all processes of a running job."""
    told = subprocess.run(["scontrol", "listpids", job["JobId"]], capture_output=True, text=True).stdout
    pids = [line.split()[0] for line in told.splitlines()[1:] if line.split()[0].isdigit()]
    for pid in pids:
        subprocess.run(["kill", f"-{name}", pid], check=False)
