"""The library on a GPU: bits, tolerances, times and memory, as one table. Exits with 1 if something is out of bounds.

    python bench/gpu.py                        on the first GPU; where there is none it says so and exits with 0
    python bench/gpu.py --device cpu --small   the same checks on the CPU, at a tiny size, in under a minute

A random model of a billion parameters is made in a temporary folder, which takes about 8 GB for a while. Needs
torch, transformers, peft, safetensors, pandas and pyarrow; the library need not be installed, and the network is not
used.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_checks  # noqa: F401  # first: it says where the library lies, and how torch is to start
import peft
import torch
import transformers
from gpu_checks.checks import CHECKS
from gpu_checks.finding import Finding
from gpu_checks.setting import SIZES, Setting

from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.errors import reports_errors

SKIPPED = "skipped: torch sees no GPU here. The same checks on the CPU: python bench/gpu.py --device cpu --small"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto", help="auto (the first GPU), cuda:N or cpu (default: %(default)s)")
    p.add_argument("--small", action="store_true", help="a model of a few hundred thousand parameters")
    p.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"some of {', '.join(CHECKS)}")
    p.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's place)")
    return p


def machine(device: torch.device) -> str:
    """The card and its memory, its driver, and the versions that decide about bits."""
    built = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads; {built}"
    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, {card.total_memory / 2**30:.1f} GiB, driver {_driver()}, CUDA {torch.version.cuda}; {built}"


def rows(name: str, setting: Setting) -> Iterator[tuple[str, Finding, float]]:
    """Every finding of a check, with the seconds that it took; an error ends the check, as a finding that failed."""
    began = time.perf_counter()
    try:
        for finding in CHECKS[name](setting):
            yield name, finding, time.perf_counter() - began
            began = time.perf_counter()
    except (Exception, SystemExit) as error:  # so that the others are looked at all the same
        told = (str(error).strip().splitlines() or [""])[0]
        yield name, Finding("ended by an error", f"{type(error).__name__}: {told}", "none", False), 0.0


def table(found: list[tuple[str, Finding, float]]) -> str:
    """The findings as markdown."""
    lines = ["| check | what | figure | bound | verdict | seconds |", "|---|---|---|---|---|---|"]
    for name, finding, seconds in found:
        cells = (name, finding.what, finding.figure, finding.bound, finding.verdict, f"{seconds:.1f}")
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parser().parse_args(argv)
    if given.device == "auto" and not torch.cuda.is_available():
        print(SKIPPED)
        return
    device, size = resolve_device(given.device), SIZES["small" if given.small else "large"]
    found = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        setting = Setting(device, size, Path(folder))
        for name in given.only or CHECKS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found += list(rows(name, setting))
    failed = sum(finding.ok is False for _, finding, _ in found)
    print(table(found))
    print(f"\n{machine(device)}; {len(found)} findings, {failed} failed")
    if failed:
        sys.exit(1)


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return told[0] if told else "unknown"


if __name__ == "__main__":
    sys.exit(main())
