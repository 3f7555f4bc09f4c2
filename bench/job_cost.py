"""What a job of the workflow costs beyond its work: the start of its process, and of snakemake where a cluster runs it.

  python bench/job_cost.py                                      # all rules that compute something, 5 repeats
  python bench/job_cost.py --rules segment perplexity --repeats 9

A tiny project is run once, with adapters in closed form and trained, a ranking, a choice of layers and an export, and
what Snakemake ran is kept. Then, in turn: each rule's process with nothing but its imports (the start), the same
process as Snakemake ran it (the whole job, on a model that is next to nothing), the command that links results into an
experiment's folder, and the snakemake process that a cluster starts for a job. Seconds are medians; those of the
processor, user and system, say more where others use the machine. What the start consists of is told by
`-X importtime`, which itself costs a little.
"""

from __future__ import annotations

import argparse
import ast
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from random_model import mistral_config, write_model

from mistral_prune_lora.errors import reports_errors

ROOT = Path(__file__).resolve().parents[1]
GEOMETRY = {"layers": 8, "hidden": 64, "intermediate": 112, "heads": 4, "kv_heads": 2, "vocabulary": 259}
EXTRA = (
    "results/tiny/importance.svg",
    "results/tiny/choice.json",
    "results/tiny/exported/merged.FULL/model.safetensors",
)
TARGET = 3.0  # seconds of a start
# A column, and the packages whose modules count in it; whatever is in none of them is Python's own and small ones.
GROUPS = {
    "torch": {"torch", "torchgen", "sympy", "mpmath"},
    "transformers": {"transformers", "tokenizers", "huggingface_hub", "safetensors", "regex"},
    "peft": {"peft", "accelerate"},
    "arrays": {"numpy", "scipy", "pandas", "pyarrow", "matplotlib", "PIL"},
    "snakemake": {"snakemake"},
    "library": {"mistral_prune_lora"},
}
_TIMED = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)")


@dataclass
class Measured:
    """Seconds of each run of one command: by the clock, and of the processor."""

    command: list[str]
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def run(self, folder: Path) -> None:
        """Run it once more, in a folder."""
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(self.command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.clock.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def told(self) -> str:
        """The medians, as two columns."""
        return f"{statistics.median(self.clock):7.2f} {statistics.median(self.processor):6.2f}"


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5, help="runs of each process (default: %(default)s)")
    p.add_argument("--rules", nargs="+", metavar="SCRIPT", help="these scripts alone, e.g. segment (default: all)")
    p.add_argument("--folder", type=Path, help="where the project is made (default: a temporary folder)")
    return p


@reports_errors
def main() -> None:
    args = main_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        project = Path(folder)
        make_project(project)
        subprocess.run([*snakemake(), "--skip-script-cleanup", "all", *EXTRA, *CONFIG], cwd=project, check=True)
        scripts = {name: file for name, file in kept_scripts(project).items() if name in (args.rules or [name])}
        starts = {name: Measured([sys.executable, str(only_imports(file))]) for name, file in scripts.items()}
        jobs = {name: Measured([sys.executable, str(file)]) for name, file in scripts.items()}
        beside = {"place (shell)": Measured(place(project)), "snakemake (cluster)": Measured(inner_snakemake(project))}
        for _ in range(args.repeats):
            for measured in (*starts.values(), *jobs.values(), *beside.values()):
                measured.run(project)
        report(starts, jobs, {name: groups(each.command, project) for name, each in starts.items()}, beside)


CONFIG = ("--configfile", "config.yaml")  # last: it takes every word that follows it for a file


def snakemake() -> list[str]:
    return [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]


def make_project(folder: Path) -> None:
    """A configuration that asks for all kinds of jobs, each with next to no work."""
    write_model(folder / "dense", mistral_config(**GEOMETRY))
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(200)]
    (folder / "corpus.txt").write_text("\n".join(sentences), encoding="utf-8")
    few = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "warmup_steps": 0}
    windows = {"seqlen": 32, "windows": 4, "dtype": "fp32"}
    experiment = {
        "model": "dense",
        "layers": {"B": [3, 4], "C": [5, 6]},
        "adapters": {"A": "closed-form", "B": "train", "C": "train"},
        "importance": {"dataset": "corpus", "drop": 2, **windows},
        "choose": {"dataset": "corpus", "drop": 2, **windows},
        "closed_form": {"held_out": 1, **windows},
        "distill": {
            "dataset": "corpus",
            "share_teacher_states": True,
            "share_prefix_states": True,
            "lora": {"rank": 2},
            "parts": dict.fromkeys("BC", few),
            **windows,
        },
        "perplexity": {"datasets": ["corpus"], **windows},
    }
    config = {
        "models": {"dense": {"path": "dense", "num_layers": GEOMETRY["layers"]}},
        "datasets": {"corpus": {"text_files": ["corpus.txt"]}},
        "experiments": {"tiny": experiment},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def kept_scripts(project: Path) -> dict[str, Path]:
    """One process of each script, as Snakemake wrote it: with the job's inputs and settings before its text."""
    found = {}
    for file in sorted((project / ".snakemake/scripts").glob("*.py")):
        found[file.name.split(".")[1]] = file
    return found


def only_imports(script: Path) -> Path:
    """The same process up to where its own work begins."""
    text = script.read_text(encoding="utf-8")
    preamble = text[: text.index("# snakemake preamble end #")].count("\n") + 1
    nodes = [node for node in ast.parse(text).body if node.lineno > preamble]
    end = max(node.end_lineno for node in nodes if _imports(node))
    cut = script.with_name(f"start.{script.name}")
    cut.write_text("".join(text.splitlines(keepends=True)[:end]), encoding="utf-8")
    return cut


def _imports(node: ast.stmt) -> bool:
    """Whether it imports something, quickly or not."""
    quick = isinstance(node, ast.With) and "quick_imports()" in ast.unparse(node.items[0])
    return quick or isinstance(node, ast.Import | ast.ImportFrom)


def place(project: Path) -> list[str]:
    result = next((project / "results/shared/ppl").glob("*.json"))
    return [sys.executable, "-m", "mistral_prune_lora.workflow.place", "--made", str(result), "--at", "placed.json"]


def inner_snakemake(project: Path) -> list[str]:
    """What the jobs of a cluster start with: the workflow read, and the plan of one job, which is not run here."""
    made = next((project / "results/shared/activations").glob("A*.safetensors")).stem
    job = f"--mode subprocess --force --nolock --target-jobs segment:made={made} --allowed-rules segment --dry-run"
    return [*snakemake(), *shlex.split(job), *CONFIG]


def groups(command: Sequence[str], folder: Path) -> Counter[str]:
    """Seconds of the modules of each group, without those that they import in their turn."""
    timed = [command[0], "-X", "importtime", *command[1:]]
    printed = subprocess.run(timed, cwd=folder, check=True, capture_output=True, text=True).stderr
    found: Counter[str] = Counter()
    for microseconds, module in _TIMED.findall(printed):
        package = module.split(".")[0]
        group = next((name for name, packages in GROUPS.items() if package in packages), "others")
        found[group] += int(microseconds) / 1e6
    return found


def report(
    starts: dict[str, Measured],
    jobs: dict[str, Measured],
    imported: dict[str, Counter[str]],
    beside: dict[str, Measured],
) -> None:
    columns = [*GROUPS, "others"]
    told = "".join(f"{name:>13}" for name in columns)
    print(f"\n{'':18}   start, s   whole job, s   imports, s by their modules")
    print(f"{'script':18}  clock    cpu   clock    cpu{told}")
    for name in starts:
        parts = "".join(f"{imported[name][column]:13.2f}" for column in columns)
        print(f"{name:18}{starts[name].told()} {jobs[name].told()}{parts}")
    for name, measured in beside.items():
        print(f"{name:18}{measured.told()}")
    worst = max(starts, key=lambda name: statistics.median(starts[name].processor))
    seconds = statistics.median(starts[worst].processor)
    print(f"longest start: {worst}, {seconds:.2f} s   {'ok' if seconds <= TARGET else 'MISSED'} (at most {TARGET:g})")


if __name__ == "__main__":
    sys.exit(main())
