"""How fast the three stages are measured, beside plain transformers and beside what the geometry allows.

  python bench/perplexity.py --random                           # 32 layers, B 21-24, C 25-28: 38 layer passes of 84
  python bench/perplexity.py --model resources/models/smollm2-135m --b 12-15 --c 16-19
  python bench/perplexity.py --random --re-evaluate             # a new C bundle: what of FULL is run again
  python bench/perplexity.py --random --harness                 # needs lm-evaluation-harness (pip install lm-eval)

Each contender runs in a process of its own, in turn, `--repeats` times, in float32 on the CPU with all its threads, on
the same windows of random token ids. The bound is the ratio of multiply-adds with weight matrices, head included, that
is left when every distinct sequence of layers is run once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from random_model import mistral_config, write_model

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.layout.segments import segment_tree
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.text.windows import Windows, WindowsIdentity, ids_digest

RANDOM = {"layers": 32, "hidden": 1024, "intermediate": 3584, "heads": 32, "kv_heads": 8, "vocabulary": 8000}
RANDOM_BUNDLES = ("21-24", "25-28")
TARGET = 1.1  # times the bound


@dataclass(frozen=True)
class Case:
    """What every contender is given, as JSON."""

    folder: str
    dense: str
    a: str
    bundles: dict[str, str]
    layout: dict
    windows: str
    batch_size: int


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="directory of a dense model")
    which.add_argument("--random", action="store_true", help=f"a random model: {RANDOM}")
    p.add_argument("--b", type=_layers, help="layers of B, e.g. 12-15 (default with --random: 21-24)")
    p.add_argument("--c", type=_layers, help="layers of C, e.g. 16-19 (default with --random: 25-28)")
    p.add_argument("--windows", type=int, default=16, help="windows (default: %(default)s)")
    p.add_argument("--seqlen", type=int, default=512, help="token ids in a window (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=4, help="windows at once (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="runs of each contender (default: %(default)s)")
    p.add_argument("--re-evaluate", action="store_true", help="also time FULL after a change of C's bundle")
    p.add_argument("--harness", action="store_true", help="also time A in lm-evaluation-harness")
    p.add_argument("--folder", type=Path, help="where models and activations are put (default: a temporary folder)")
    return p


@reports_errors
def main() -> None:
    args = main_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        case = prepare(args, Path(folder))
        spec = Path(folder) / "case.json"
        spec.write_text(json.dumps(asdict(case)), encoding="utf-8")
        names = ["ours", "plain", "bare"]
        names += ["full", "new_c"] if args.re_evaluate else []
        names += ["a_alone", "harness"] if args.harness else []
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for number in range(args.repeats):
            for name in names:
                runs[name].append(run(name, spec))
                told = runs[name][-1]
                print(f"{number + 1}/{args.repeats} {name:<8} {told['seconds']:8.2f} s {told['peak'] / 1e6:8.0f} MB")
        report(case, runs)


def prepare(args: argparse.Namespace, folder: Path) -> Case:
    """Write model, parts and windows."""
    dense = write_model(folder / "dense", mistral_config(**RANDOM)) if args.random else args.model
    b, c = (args.b or _layers(RANDOM_BUNDLES[0]), args.c or _layers(RANDOM_BUNDLES[1]))
    config = open_checkpoint(dense).config
    layout = Layout(config["num_hidden_layers"], b, c)
    prune_model(dense, layout, save_dir=folder / "A", save_removed_dir=folder / "bundles")
    generator = torch.Generator().manual_seed(0)
    shape = (args.windows, args.seqlen)
    ids = torch.randint(config["vocab_size"], shape, generator=generator, dtype=torch.int32)
    identity = WindowsIdentity(
        dataset="random ids",
        split="test",
        source="a generator",
        text_sha256="0" * 64,
        ids_sha256=ids_digest(ids),
        tokenizer="none",
        tokenizer_sha256="0" * 64,
        utf8_bytes=ids.numel(),
        seqlen=args.seqlen,
        windows=args.windows,
        text_windows=args.windows,
    )
    Windows(ids, identity).save(folder / "windows.safetensors")
    return Case(
        folder=str(folder),
        dense=str(Path(dense).absolute()),
        a=str(folder / "A"),
        bundles={part: str(folder / "bundles" / part) for part in "BC"},
        layout=asdict(layout),
        windows=str(folder / "windows.safetensors"),
        batch_size=args.batch_size,
    )


def run(name: str, spec: Path) -> dict:
    """One run of one contender."""
    worker = Path(__file__).with_name("perplexity_workers.py")
    done = subprocess.run([sys.executable, str(worker), name, str(spec)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(case: Case, runs: dict[str, list[dict]]) -> None:
    """Medians and what they are to be measured by."""
    seconds = {name: statistics.median(r["seconds"] for r in each) for name, each in runs.items()}
    peak = {name: max(r["peak"] for r in each) for name, each in runs.items()}
    ratio = statistics.median(o["seconds"] / p["seconds"] for o, p in zip(runs["ours"], runs["plain"], strict=True))
    layout = Layout(**case.layout)
    passes = sum(len(segment.layers) for segment in segment_tree(layout))
    one_by_one = sum(len(layout.active(stage)) for stage in STAGES)
    head = head_in_layers(case)
    allowed = (passes + 3 * head) / (one_by_one + 3 * head)
    print(f"\nlayer passes             {passes} of {one_by_one}; the head weighs {head:.2f} layers")
    print(f"ours / plain, time       {ratio:.3f}   (medians {seconds['ours']:.2f} s, {seconds['plain']:.2f} s)")
    print(f"bound by multiply-adds   {allowed:.3f}")
    print(f"ours / bound             {ratio / allowed:.3f}   {verdict(ratio / allowed <= TARGET)} (at most {TARGET})")
    print(f"efficiency of ours       {seconds['bare'] / seconds['ours']:.1%} of a bare loop of the same products")
    print(
        f"peak memory              {peak['ours'] / 1e6:.0f} MB against {peak['plain'] / 1e6:.0f} MB"
        f"   {verdict(peak['ours'] < peak['plain'])} (less than plain)"
    )
    for stage in STAGES:
        found = [runs[name][0]["nll"][stage] for name in ("ours", "plain")]
        print(f"mean NLL of {stage:<12} {found[0]:.6f} ours, {found[1]:.6f} plain")
    if "new_c" in runs:
        again = statistics.median(n["seconds"] / f["seconds"] for n, f in zip(runs["new_c"], runs["full"], strict=True))
        tree = segment_tree(layout)
        redone = _after_c(tree)
        whole = len(layout.active("FULL"))
        print(f"FULL after a new C       {again:.3f} of a full evaluation, {seconds['new_c']:.2f} s")
        print(
            f"bound by multiply-adds   {(redone + head) / (whole + head):.3f}   ({redone} of {whole} layers, and head)"
        )
    if "harness" in runs:
        pairs = zip(runs["a_alone"], runs["harness"], strict=True)
        print(f"A alone, ours / harness  {statistics.median(o['seconds'] / h['seconds'] for o, h in pairs):.3f}")
        print(f"mean NLL of A            {runs['a_alone'][0]['nll']['A']:.6f} ours, ", end="")
        print(f"{runs['harness'][0]['nll']['A']:.6f} harness")


def head_in_layers(case: Case) -> float:
    """Multiply-adds of the output projection, in those of a layer's matrices."""
    dense = open_checkpoint(case.dense)
    matrices = [entry.shape for entry in dense.layer(0).values() if len(entry.shape) == 2]
    rows, columns = dense.entries[head_name(dense)].shape
    return rows * columns / sum(a * b for a, b in matrices)


def verdict(holds: bool) -> str:
    return "ok" if holds else "MISSED"


def _after_c(tree) -> int:
    """Layers of FULL that come after the last boundary which does not depend on C."""
    changed: set[str | None] = set()
    for segment in tree:
        if segment.part == "C" or segment.parent in changed:
            changed.add(segment.name)
    return sum(len(s.layers) for s in tree if s.name in changed)


def _layers(text: str) -> tuple[int, ...]:
    first, last = map(int, text.split("-"))
    return tuple(range(first, last + 1))


if __name__ == "__main__":
    sys.exit(main())
