"""How an evaluation in shards spreads over the jobs of a Slurm, and what it would come to on 8 and 64 GPUs.

  python bench/scaling.py                          # 1, 2 and 4 slots, about 8 minutes on 2 cores
  python bench/scaling.py --slots 1 2 --repeats 3

As root, with Debian's slurm-wlm and munge: one node of the Slurm that the tests start, which believes in 4 CPUs. A
random model is measured on windows that 8 jobs of one thread share, with at most so many of them at a time; one job
gathers what they made. Windows are cut before. For every job it is told how long it waited in Slurm's queue (which
counts whole seconds), how long its two snakemake processes took to start and to end, and Python with its imports, and
its work. The last two are by Snakemake's benchmark and by when its log came into being and was closed. The main process
looks at its jobs once a second; what it loses where it looks less often, as on a cluster, is in the projection.

What follows is a projection, no measurement: `scaling_projection.py` says what it rests on, and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from random_model import mistral_config, write_model

from mistral_prune_lora.errors import PipelineError, reports_errors

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/support"))

from scaling_projection import Assumed, report_projection  # noqa: E402
from slurm_node import answers, lacking, slurm_node  # noqa: E402
from slurm_project import PROMPT, jobs, rule_of  # noqa: E402

GEOMETRY = {"layers": 12, "hidden": 512, "intermediate": 1792, "heads": 8, "kv_heads": 2, "vocabulary": 259}
WINDOWS, SEQLEN, BATCH, SHARDS, CPUS = 48, 256, 3, 8, 4
RULE = "dense_perplexity"
RESULT = "results/measured/ppl/corpus/dense.FULL.json"


@dataclass(frozen=True)
class JobTimes:
    """Seconds of one job of the Slurm.

    Attributes:
        queue: from its submission to its start, in whole seconds.
        snakemake: from its start to that of its own process: two snakemakes, one that starts the other by srun.
        python: of its own process, what is not work: Python's start, imports and end.
        work: from the end of its imports to its result.
        end: from its own process's end to its last word.
        cpu: of the processor, of its own process.
    """

    queue: float
    snakemake: float
    python: float
    work: float
    end: float
    cpu: float

    @property
    def start_up(self) -> float:
        """All that is not work, once Slurm has started it."""
        return self.snakemake + self.python + self.end


@dataclass(frozen=True)
class Run:
    """The same jobs with so many slots.

    Attributes:
        seconds: of the whole snakemake, by the clock.
        shards: the jobs that share the windows.
        gathering: the job that puts their results together.
    """

    slots: int
    seconds: float
    shards: list[JobTimes]
    gathering: JobTimes


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4], help="jobs at a time (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=1, help="runs with each of them, in turn (default: %(default)s)")
    p.add_argument("--folder", type=Path, help="where the project is made (default: a temporary folder)")
    return p


@reports_errors
def main() -> None:
    args = main_parser().parse_args()
    why = "a Slurm answers already, which would be measured instead" if answers() else lacking()
    if why:
        raise PipelineError(why, where="Slurm", mend="run it as root where slurm-wlm and munge are installed")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        made = make_project(Path(folder) / "project")
        runs = []
        with slurm_node(Path(folder) / "node", cpus=CPUS):
            os.environ["PATH"] = f"{folder}/node/bin{os.pathsep}{os.environ['PATH']}"
            for _ in range(args.repeats):
                for slots in args.slots:
                    before = {job["JobId"] for job in jobs()}
                    runs.append(run(made, Path(folder) / f"run-{len(runs)}", slots, before))
    report(runs)
    # The shortest, since whatever else runs on this machine makes it longer, and a cluster's node is a job's own.
    report_projection(min(job.start_up for run in runs for job in run.shards), Assumed())


def make_project(folder: Path) -> Path:
    """A random model and a text, with the windows cut already."""
    write_model(folder / "dense", mistral_config(**GEOMETRY))
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(600)]
    (folder / "corpus.txt").write_text("\n".join(sentences), encoding="utf-8")
    measured = {
        "datasets": ["corpus"], "variants": ["dense"], "stages": ["FULL"], "compare_with_dense": False,
        "seqlen": SEQLEN, "windows": WINDOWS, "batch_size": BATCH, "dtype": "fp32", "shards": SHARDS,
    }  # fmt: skip
    config = {
        "models": {"dense": {"path": "dense", "num_layers": GEOMETRY["layers"]}},
        "datasets": {"corpus": {"text_files": ["corpus.txt"]}},
        "experiments": {"measured": {"model": "dense", "layers": {"B": [8], "C": [9]}, "perplexity": measured}},
        "report": False,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    _snakemake(folder, "--until", "windows", "--cores", "1")
    return folder


def run(made: Path, folder: Path, slots: int, before: set[str]) -> Run:
    """The evaluation with so many jobs at a time, in a copy of the project; `before` are the jobs of earlier runs."""
    subprocess.run(["cp", "-a", made, folder], check=True)
    profile = ("--workflow-profile", str(ROOT / "profiles/slurm"), "--slurm-keep-successful-logs")
    rules = (RULE, f"{RULE}_shard")
    threads, gpus = [f"{rule}=1" for rule in rules], [f"{rule}:gpu=0" for rule in rules]
    settings = ("--set-threads", *threads, "--set-resources", *gpus)
    began = time.perf_counter()
    _snakemake(folder, *profile, "--jobs", str(slots), *settings)
    seconds = time.perf_counter() - began
    mine = {rule_of(job): job for job in jobs(RULE) if job["JobId"] not in before}
    shards = [times(folder, job) for rule, job in sorted(mine.items()) if rule.startswith(f"{RULE}_shard")]
    (gathering,) = (times(folder, job) for rule, job in mine.items() if not rule.startswith(f"{RULE}_shard"))
    found = json.loads((folder / RESULT).read_text(encoding="utf-8"))["mean_nll"]
    print(f"{slots} slots: {seconds:.0f} s, mean NLL {found!r}", flush=True)
    shutil.rmtree(folder)
    return Run(slots, seconds, shards, gathering)


def _snakemake(folder: Path, *arguments: str) -> None:
    command = [sys.executable, str(PROMPT), "--snakefile", str(ROOT / "Snakefile"), RESULT, *arguments]
    command += ["--configfile", "config.yaml"]
    told = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if told.returncode:
        raise PipelineError(told.stdout[-3000:], where=f"snakemake in {folder}")


def times(folder: Path, job: dict[str, str]) -> JobTimes:
    """What one job's files and Slurm say of it."""
    words = rule_of(job).split("_wildcards_")[1].split("_")
    name = ".".join(words[:2])  # what it is made of, and which shard
    slurm, own = _lived(Path(job["StdOut"])), _lived(folder / "logs" / RULE / f"{name}.log")
    header, row = (folder / "benchmarks" / RULE / f"{name}.tsv").read_text(encoding="utf-8").splitlines()[:2]
    told = dict(zip(header.split("\t"), row.split("\t"), strict=True))
    work, seconds = own[1] - own[0], float(told["s"])
    return JobTimes(
        queue=_whole_seconds(job["StartTime"]) - _whole_seconds(job["SubmitTime"]),
        snakemake=own[0] - slurm[0] - (seconds - work),
        python=seconds - work,
        work=work,
        end=slurm[1] - own[1],
        cpu=float(told["cpu_time"]),
    )


def _lived(file: Path) -> tuple[float, float]:
    """When a file came into being and when it was last written to; Python itself does not tell the first."""
    told = subprocess.run(["stat", "--format=%.W %.Y", file], capture_output=True, text=True, check=True).stdout
    born, written = map(float, told.split())
    if not born:
        told = "its file system does not say when files came into being"
        raise PipelineError(told, where=file.parent, mend="name a --folder on another one, such as ext4")
    return born, written


def _whole_seconds(told: str) -> float:
    return time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S"))


def report(runs: Sequence[Run]) -> None:
    """The table: medians over all jobs with so many slots, and over their runs."""
    cores = len(os.sched_getaffinity(0))
    columns = [field.name for field in fields(JobTimes)]
    print(f"\n{SHARDS} shards of {WINDOWS * SEQLEN // SHARDS} tokens, one thread each; {CPUS} CPUs for Slurm", end="")
    print(f" on {cores} cores, load {os.getloadavg()[1]:.1f}. Seconds, medians.")
    print(f"{'slots':8}{'whole':>8}{'speed-up':>10}{'efficiency':>12}{'of cores':>10}", end="")
    print("".join(f"{name:>11}" for name in (*columns, "start-up")))
    whole = {slots: statistics.median(r.seconds for r in runs if r.slots == slots) for slots in _slots(runs)}
    least = min(whole)
    for slots, seconds in whole.items():
        speed_up = whole[least] * least / seconds
        efficiency = f"{speed_up / slots:12.0%}{speed_up / min(slots, cores):10.0%}"
        print(f"{slots:<8}{seconds:8.1f}{speed_up:10.2f}{efficiency}", end="")
        print(_medians([job for r in runs if r.slots == slots for job in r.shards], columns))
    print(f"{'gathering':48}", end="")
    print(_medians([r.gathering for r in runs], columns))
    shared = [str(slots) for slots in whole if slots > cores]
    if shared:
        print(f"{' and '.join(shared)} slots share {cores} cores: no more than {cores} can gain time.")


def _slots(runs: Sequence[Run]) -> list[int]:
    return sorted({r.slots for r in runs})


def _medians(found: Sequence[JobTimes], columns: Sequence[str]) -> str:
    return "".join(f"{statistics.median(getattr(j, name) for j in found):11.1f}" for name in (*columns, "start_up"))


if __name__ == "__main__":
    sys.exit(main())
