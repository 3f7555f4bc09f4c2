"""A user's working directory, and snakemake run in it for real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# Jobs by rule: all that the tiny project's own configuration asks for.
EVERYTHING = {
    "prune_B3to4_C5to6": 1,
    "merge_A": 1,
    "merge_B_3to4": 1,
    "merge_C_5to6": 1,
    "windows": 1,
    "segment": 6,
    "dense_perplexity": 1,
    "perplexity": 6,
    "summary": 1,
    "plot_perplexity": 1,
}


def configuration() -> dict:
    """Given adapters, pruned here, measured at three stages."""
    experiment = {
        "model": "dense",
        "layers": {"B": [3, 4], "C": [5, 6]},
        "adapters": {part: f"adapters/{part}" for part in "ABC"},
        "perplexity": {"datasets": ["corpus"], "seqlen": 32, "windows": 6, "batch_size": 4, "dtype": "fp32"},
    }
    return {
        "models": {"dense": {"path": "dense", "num_layers": 8}},
        "datasets": {"corpus": {"text_files": ["corpus.txt"]}},
        "experiments": {"tiny": experiment},
        "report": False,  # tests of their own look at its pages
    }


class Project:
    """A working directory with a configuration, and snakemake to run in it."""

    def __init__(self, folder: Path, config: dict, root: Path = ROOT) -> None:
        self.folder, self.config, self.root = folder, config, root

    def snakemake(self, *arguments: str, succeeds: bool = True) -> str:
        """Run `snakemake --cores 2` and return everything it printed."""
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(self.root / "Snakefile"), "--cores", "2"]
        run = subprocess.run(
            # The configuration last: --configfile takes every word that follows it for a file.
            [*command, *arguments, "--configfile", "config.yaml"],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            env=os.environ | {"PYTHONPATH": str(self.root / "lib")},
        )
        assert (run.returncode == 0) == succeeds, run.stdout[-8000:]
        return run.stdout

    def jobs(self, *arguments: str) -> dict[str, int]:
        """Run snakemake and return how many jobs of each rule it ran; {} if nothing was to be done.

        Left out are `all` and what puts links into an experiment's folder.
        """
        return _told(re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", self.snakemake(*arguments)))

    def planned(self, *arguments: str) -> dict[str, int]:
        """How many jobs of each rule snakemake would run, as `jobs`; those that hang on what is made before may not."""
        printed = self.snakemake("--dry-run", *arguments)
        table = re.search(r"Job stats:\njob\s+count\n[-\s]+\n(.*?)\ntotal", printed, re.DOTALL)
        if table is None:
            assert "Nothing to be done" in printed
            return {}
        return _told(rule for line in table[1].splitlines() for rule in [line.split()[0]] * int(line.split()[1]))

    def replace_adapter(self, part: str, by: str) -> None:
        """Put another adapter's files in place of a part's."""
        for file in (self.folder / "adapters" / by).iterdir():
            shutil.copyfile(file, self.folder / "adapters" / part / file.name)

    def path(self, name: str) -> Path:
        """Something in the experiment's folder."""
        return self.folder / "results" / "tiny" / name


def _told(rules: Iterable[str]) -> dict[str, int]:
    return dict(Counter(rule for rule in rules if rule != "all" and not rule.startswith("place_")))


def result(project: Project, variant: str, stage: str) -> dict:
    """A perplexity result of the tiny project."""
    return json.loads(project.path(f"ppl/corpus/{variant}.{stage}.json").read_text())


def copied(project: Project, folder: Path) -> Project:
    """The same project before its first run, in another folder."""
    kept = ("dense", "adapters", "corpus.txt")
    folder.mkdir()
    subprocess.run(["cp", "-a", *(str(project.folder / name) for name in kept), str(folder)], check=True)
    return Project(folder, project.config)
