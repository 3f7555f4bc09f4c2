"""How fast A is merged, beside a plain copy of its weights and beside transformers with PEFT; and how much memory.

  python bench/merge.py                                # Mistral-7B's geometry, 24 of 32 layers kept: a file of 10.99 GB
  python bench/merge.py --layers 2 --repeats 1 --memory_layers 1 --no_peft

The contenders run in turn, each in a process of its own, `--repeats` times, with a sync before each:
  copy        cp of A's weights, then fsync: the least that any merge has to read and write
  merge       the merge as with --no_verify; it digests all inputs and outputs, and fsyncs
  merge+check the merge as it is by default, which reads the result back while it is being written
  PEFT        from_pretrained, PeftModel.from_pretrained, merge_and_unload, PassLayers, save_pretrained; no fsync
Every other turn has merge+check before merge. Ratios are medians over the turns. Where the time goes is told by the
merge itself: wall-clock seconds by kind of work, on threads that run beside each other. The adapter has rank 16 on all
seven projections, its factors are bf16. Nothing is dropped from the page cache. Needs free space for three times A's
weights, and memory for PEFT's dense model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from random_model import mistral_config, write_model

from mistral_prune_lora.checkpoints.descriptions import make_manifest
from mistral_prune_lora.checkpoints.directories import SINGLE_FILE
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage.safetensors_file import TensorSpec, read_header, write_file

DROPPED = 8
GEOMETRY = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 32000}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
RANK = 16
TARGETS = {("merge", "copy"): 1.25, ("merge+check", "merge"): 1.4, ("merge+check", "copy"): None}
MERGE_WORKER = """
import json, sys
from mistral_prune_lora.merging.merge import merge_adapters
base, adapter, output, verify, report = sys.argv[1:]
seconds = merge_adapters(base, [adapter], output, device="cpu", verify=verify == "verify").seconds
json.dump(seconds, open(report, "w"))
"""
PEFT_WORKER = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from mistral_prune_lora.pruning.identity import PassLayer
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
for i in json.load(open(base + "/manifest.json"))["stages"]["A"]["dropped_layers"]:
    model.model.layers[i] = PassLayer(i)
model.save_pretrained(output)
"""


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        seconds: wall clock.
        cpu_seconds: of its process, user and system.
        peak_mb: the largest resident size of its process.
        work: of a merge, where the time went: seconds by kind of work.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    work: dict[str, float] = field(default_factory=dict)


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=24, help="layers that A keeps, of 8 more (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    p.add_argument(
        "--memory_layers", type=int, nargs="*", default=[8, 16], help="sizes of A whose peak memory is measured as well"
    )
    p.add_argument("--no_peft", action="store_true", help="leave PEFT out")
    p.add_argument("--work_dir", type=Path, help="where the files go (default: a temporary directory)")
    p.add_argument("--keep", action="store_true", help="keep the model and adapter, and use those that are there")
    p.add_argument("--json", type=Path, help="write every run here")
    return p


def layout_of(kept: int) -> Layout:
    """Four layers each in B and C, three from the end where there are so many: 21-24 and 25-28 of 32."""
    first = max(1, kept - 3)
    return Layout(kept + DROPPED, tuple(range(first, first + 4)), tuple(range(first + 4, first + DROPPED)))


def prepare(folder: Path, kept: int) -> tuple[Path, Path]:
    """Write an A model and an adapter unless they are there; returns their directories."""
    layout, a, adapter = layout_of(kept), folder / f"A{kept}", folder / f"adapter{kept}"
    if (adapter / "adapter_config.json").is_file():
        return a, adapter
    for half_written in (a, adapter):
        shutil.rmtree(half_written, ignore_errors=True)
    torch.manual_seed(0)
    write_model(a, mistral_config(layers=layout.num_layers, **GEOMETRY), layout.kept)
    manifest = make_manifest(layout, base_model="random", model_type="mistral", selection={}, artifacts={})
    (a / "manifest.json").write_text(json.dumps(manifest))
    (a / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    adapter.mkdir()
    write_adapter(adapter, read_header(a / SINGLE_FILE), layout)
    return a, adapter


def write_adapter(folder: Path, weights: dict, layout: Layout) -> None:
    """A random bf16 adapter; adapter_config.json comes last, as the sign that all is written."""
    specs = []
    for name, entry in weights.items():
        if name.split(".")[-2] in (*ATTENTION, *MLP):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            specs.append(TensorSpec(f"{module}.lora_A.weight", "BF16", (RANK, entry.shape[1])))
            specs.append(TensorSpec(f"{module}.lora_B.weight", "BF16", (entry.shape[0], RANK)))
    shapes = {spec.name: spec.shape for spec in specs}
    write_file(
        folder / "adapter_model.safetensors",
        specs,
        lambda name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02),
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [*ATTENTION, *MLP],
        "layers_to_transform": list(layout.kept),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def timed(words: list, *, fsync: Path | None = None) -> Run:
    """Run a command after a sync; `fsync` names a file to be synced as part of it."""
    os.sync()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=errors)
        peak_kb = 0
        # Not wait4's ru_maxrss: that starts from the size of the process that forked, which is this one.
        while process.poll() is None:
            peak_kb = max(peak_kb, _high_water(process.pid))
            time.sleep(0.02)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{words[0]} failed:\n{errors.read().decode()}")
    if fsync:
        descriptor = os.open(fsync, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(seconds, used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime, peak_kb / 1000)


def _high_water(pid: int) -> int:
    """The largest resident size that a process has had since its exec, in kB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def merge(a: Path, adapter: Path, output: Path, *, verify: bool) -> Run:
    """One merge in a process of its own."""
    with tempfile.NamedTemporaryFile("r") as report:
        run = timed(
            [sys.executable, "-c", MERGE_WORKER, a, adapter, output, "verify" if verify else "no_verify", report.name]
        )
        return replace(run, work=json.load(report))


def turn(a: Path, adapter: Path, folder: Path, *, check_first: bool, peft: bool) -> tuple[dict[str, Run], bool | None]:
    """(every contender's run, whether PEFT's tensors are ours bit for bit)."""
    copy, ours, theirs = (folder / name for name in ("copy.safetensors", "ours", "peft"))
    runs, same = {"copy": timed(["cp", a / SINGLE_FILE, copy], fsync=copy)}, None
    copy.unlink()
    for verify in (check_first, not check_first):
        shutil.rmtree(ours, ignore_errors=True)
        runs["merge+check" if verify else "merge"] = merge(a, adapter, ours, verify=verify)
    if peft:
        runs["PEFT"] = timed([sys.executable, "-c", PEFT_WORKER, a, adapter, theirs])
        same = equal_tensors(ours, theirs)
        shutil.rmtree(theirs)
    shutil.rmtree(ours)
    return {name: runs[name] for name in ("copy", "merge", "merge+check", "PEFT") if name in runs}, same


def equal_tensors(first: Path, second: Path) -> bool:
    """Whether two model directories hold the same tensors, bit for bit; the second may be in shards."""
    ours = read_header(first / SINGLE_FILE)
    theirs = {name: entry for file in second.glob("*.safetensors") for name, entry in read_header(file).items()}
    return ours.keys() == theirs.keys() and all(
        entry.dtype == theirs[name].dtype
        and torch.equal(entry.read().view(torch.uint8), theirs[name].read().view(torch.uint8))
        for name, entry in ours.items()
    )


def ratio(turns: list[dict[str, Run]], first: str, second: str) -> float:
    """The median over the turns of one contender's time by another's."""
    return statistics.median(runs[first].seconds / runs[second].seconds for runs in turns)


def table(turns: list[dict[str, Run]]) -> str:
    """The contenders as markdown."""
    lines = [
        "| | seconds (each turn) | median | x copy | CPU seconds | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name in turns[0]:
        seconds = [runs[name].seconds for runs in turns]
        cpu = statistics.median(runs[name].cpu_seconds for runs in turns)
        peak = max(runs[name].peak_mb for runs in turns)
        each = ", ".join(f"{value:.1f}" for value in seconds)
        middle, times = statistics.median(seconds), ratio(turns, name, "copy")
        lines.append(f"| {name} | {each} | {middle:.1f} | {times:.2f} | {cpu:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def where_time_goes(turns: list[dict[str, Run]]) -> str:
    """The kinds of work of both merges as markdown."""
    names = ("merge", "merge+check")
    lines = ["| seconds (median) | " + " | ".join(names) + " |", "|---|---|---|"]
    for work in turns[0]["merge+check"].work:
        medians = (statistics.median(runs[name].work.get(work, 0) for runs in turns) for name in names)
        lines.append(f"| {work} | " + " | ".join(f"{value:.2f}" for value in medians) + " |")
    return "\n".join(lines)


def measure(given: argparse.Namespace, folder: Path) -> dict:
    a, adapter = prepare(folder, given.layers)
    nbytes = (a / SINGLE_FILE).stat().st_size
    print(f"A keeps {given.layers} layers, {nbytes / 1e9:.2f} GB; {os.cpu_count()} cores; torch {torch.__version__}\n")
    turns, same = [], None
    for i in range(given.repeats):
        runs, same = turn(a, adapter, folder, check_first=i % 2 == 1, peft=not given.no_peft)
        turns.append(runs)
    print(table(turns), "\n\n" + where_time_goes(turns), "\n")
    ratios = {f"{first} / {second}": ratio(turns, first, second) for first, second in TARGETS}
    for (name, value), target in zip(ratios.items(), TARGETS.values(), strict=True):
        print(f"{name}: {value:.2f}" + (f" (target: at most {target})" if target else ""))
    if same is not None:
        print(f"PEFT / merge: {ratio(turns, 'PEFT', 'merge'):.2f}; the same bits: {'yes' if same else 'NO'}")
    peaks = {given.layers: max(runs["merge+check"].peak_mb for runs in turns)}
    if not given.keep:
        shutil.rmtree(a)
    for kept in given.memory_layers:
        small, small_adapter = prepare(folder, kept)
        peaks[kept] = merge(small, small_adapter, folder / "small", verify=True).peak_mb
        shutil.rmtree(folder / "small")
        if not given.keep:
            shutil.rmtree(small)
    print("peak memory of merge+check by layers: " + ", ".join(f"{n}: {mb:.0f} MB" for n, mb in sorted(peaks.items())))
    return {
        "layers": given.layers,
        "bytes": nbytes,
        "turns": [{name: asdict(run) for name, run in runs.items()} for runs in turns],
        "ratios": ratios,
        "same_bits_as_peft": same,
        "peak_mb_by_layers": peaks,
    }


@reports_errors
def main() -> None:
    given = main_parser().parse_args()
    if given.work_dir:
        given.work_dir.mkdir(parents=True, exist_ok=True)
        result = measure(given, given.work_dir)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(given, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
