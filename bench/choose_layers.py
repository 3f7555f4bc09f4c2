"""What measuring every block of layers costs, beside evaluating each of them by itself; the same numbers, bit for bit.

  python bench/choose_layers.py --model smollm2                 # the example's model, 8 of 30 layers: 22 blocks
  python bench/choose_layers.py --model random                  # Mistral's proportions at a quarter of the width
  python bench/choose_layers.py --table results/smollm2/choice.csv [--healed healed.csv]   # as Markdown, nothing is run

Both contenders run in a process of their own, in turn, `--repeats` times, in float32 on the CPU. "alone" is kind to
the evaluation: one process measures all blocks, imports and digests once, the dense model's hidden states are made once
and kept, and no pruned model is written. The bound is the ratio of multiply-adds with weight matrices: of the layers,
and of the heads, which each candidate needs once, and the dense model's answers once more for each evaluation alone.

`--healed` is a CSV with the columns `dropped`, `closed_form` and `kl_dense`, of candidates after healing in closed form
and after equal training (`bench/choose_healed.py` makes it); they become columns of the table, with rank correlations.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from distillation_case import dense_model

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.choosing.candidates import blocks, running
from mistral_prune_lora.choosing.measure import DENSE, Measurement
from mistral_prune_lora.choosing.tree import Tree
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import Layout, spans
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import Windows, make_windows

WANTED = 0.6  # of the time of evaluating each block alone
CONTENDERS = ("ours", "alone")


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=("smollm2", "random"), help="what both measure")
    which.add_argument("--table", type=Path, metavar="CSV", help="tell a choice.csv as a table")
    which.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    p.add_argument("--healed", type=Path, metavar="CSV", help="KL of candidates after healing, beside --table")
    p.add_argument("--drop", type=int, default=8, help="layers in a block (default: %(default)s)")
    p.add_argument("--windows", type=int, default=8, help="(default: %(default)s)")
    p.add_argument("--seqlen", type=int, default=128, help="token ids in a window (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=4, help="windows at once (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="runs of each contender (default: %(default)s)")
    p.add_argument("--folder", type=Path, help="where models and activations are put (default: a temporary folder)")
    return p


@reports_errors
def main() -> None:
    args = main_parser().parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args)))
        return
    if args.table:
        print(markdown(pd.read_csv(args.table), pd.read_csv(args.healed) if args.healed else None))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prepare(args, Path(folder))
        runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
        for number in range(args.repeats):
            for name in CONTENDERS:
                runs[name].append(run(name, args, folder))
                told = runs[name][-1]
                print(
                    f"{number + 1}/{args.repeats} {name:<6} {told['seconds']:8.1f} s, CPU {told['cpu']:8.1f} s,"
                    f" {told['peak'] / 1e6:6.0f} MB",
                    flush=True,
                )
        report(args, Path(folder), runs)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write model and windows."""
    dense = dense_model(args.model, folder)
    windows = make_windows(
        load_text("pydoc", split="train"), load_tokenizer(dense), seqlen=args.seqlen, max_windows=args.windows
    )
    windows.save(folder / "windows.safetensors")


def run(name: str, args: argparse.Namespace, folder: str) -> dict:
    """One run of one contender."""
    words = ["--worker", name, "--drop", str(args.drop), "--batch-size", str(args.batch_size), "--folder", folder]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, args: argparse.Namespace) -> dict:
    """Measure all blocks; seconds, CPU seconds, peak memory, and the KL and NLL of every window of each block."""
    compute = Compute(torch.device("cpu"), torch.float32, args.batch_size)
    windows = Windows.load(args.folder / "windows.safetensors")
    model = open_checkpoint(args.folder / "dense")
    candidates = blocks(model.config["num_hidden_layers"], args.drop, keep_last_layer=True)
    started, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        measure = ours if name == "ours" else alone
        scores = measure(Passage(model, windows, compute), candidates, Path(scratch))
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "scores": {spans(m): [s.kl.tolist(), s.nll.tolist(), s.correct.tolist()] for m, s in scores.items()},
    }


def ours(passage: Passage, candidates: list, scratch: Path) -> dict:
    with Measurement(passage, scratch / "journal") as measurement:
        found = measurement.measure(candidates, words="ours", block=len(candidates[0])).scores
    return {missing: scores for missing, scores in found.items() if missing != DENSE}


def alone(passage: Passage, candidates: list, scratch: Path) -> dict:
    model, answers = passage.model, scratch / "dense.hidden"
    given = (passage.windows, passage.compute)
    list(evaluate_stages(Subject(model), ["FULL"], *given, work_dir=scratch, final_hidden=answers))
    found = {}
    for missing in candidates:
        a = Subject(replace(model, layout=Layout(model.config["num_hidden_layers"], (), missing)))
        dense = DenseAnswers(model, answers)
        (result,) = evaluate_stages(a, ["A"], *given, work_dir=scratch, dense=dense)
        found[missing] = result.scores
    return found


def report(args: argparse.Namespace, folder: Path, runs: dict[str, list[dict]]) -> None:
    """Medians of the pairs' ratios, and whether the numbers are equal."""
    first = [runs[name][0]["scores"] for name in CONTENDERS]
    equal = all(each["scores"] == first[0] for name in CONTENDERS for each in runs[name])
    bound, passes, apart = allowed(args, folder)
    print(f"\nblocks                 {len(first[0])} of {args.drop} layers, the last layer kept")
    print(f"layer passes           {passes} of {apart}, the dense model's among them")
    for key, words in (("cpu", "CPU time"), ("seconds", "time")):
        ratio = statistics.median(o[key] / a[key] for o, a in zip(runs["ours"], runs["alone"], strict=True))
        verdict = f"   {'reached' if ratio <= WANTED else 'MISSED'} (at most {WANTED})" * (key == "cpu")
        print(f"ours / alone, {words:<8} {ratio:.3f}{verdict}")
    print(f"bound by multiply-adds {bound:.3f}")
    print(f"numbers equal          {equal}")
    if not equal:
        raise SystemExit("the numbers differ")


def allowed(args: argparse.Namespace, folder: Path) -> tuple[float, int, int]:
    """(ratio of multiply-adds, layer passes of ours, of each block alone)."""
    model = open_checkpoint(folder / "dense")
    count = model.config["num_hidden_layers"]
    ways = [running(count, missing) for missing in blocks(count, args.drop, keep_last_layer=True)]
    passes, apart = Tree.of([range(count), *ways]).passes, count + sum(map(len, ways))
    matrices = [entry.shape for entry in model.layer(0).values() if len(entry.shape) == 2]
    head = np.prod(model.entries[head_name(model)].shape) / sum(rows * columns for rows, columns in matrices)
    # The dense model's own score, its answers for the others, and each block's.
    return float((passes + (2 + len(ways)) * head) / (apart + (1 + 2 * len(ways)) * head)), passes, apart


def markdown(table: pd.DataFrame, healed: pd.DataFrame | None) -> str:
    """The blocks of a choice.csv as a table, and how the proxies' orders agree with that of KL, healed or not."""
    rows = table[table.kind == "block"].copy()
    columns = {
        "dropped": "layers",
        "kl_dense": "KL",
        "kl_dense_se": "SE",
        "ppl": "PPL",
        "angular_distance": "angular distance",
        "angular_rank": "rank",
        "block_influence": "block influence",
        "influence_rank": "rank ",
    }
    targets = {"kl_dense": "KL"}
    if healed is not None:
        healed = healed.reindex(columns=["dropped", "closed_form", "kl_dense"]).rename(columns={"kl_dense": "trained"})
        rows, targets = rows.merge(healed, how="left"), targets | {"closed_form": "closed form", "trained": "trained"}
        columns |= targets
    shown = rows[list(columns)].rename(columns=columns)
    shown["layers"] = [spans(map(int, words.split())) for words in rows.dropped]
    lines = ["| " + " | ".join(name.strip() for name in shown) + " |", "|---" * len(shown.columns) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in shown.itertuples(index=False)]
    rankings = {"ppl": "PPL", "angular_distance": "angular distance", "block_influence": "block influence"}
    for target, words in targets.items():
        known = rows.dropna(subset=target)
        if known.empty:
            continue
        lines += ["", f"| ranking | Spearman with KL{f', {words},' * (target != 'kl_dense')} of {len(known)} blocks"]
        lines[-1] += " | picks of them | above the best |"
        lines.append("|---|---|---|---|")
        for ranking, told in {**rankings, **targets}.items():
            if ranking == target or known[ranking].isna().any():
                continue
            rho = known[ranking].corr(known[target], method="spearman")
            picked = known.sort_values(ranking).iloc[0]
            regret = picked[target] - known[target].min()
            lines.append(f"| {told} | {rho:.2f} | {spans(map(int, picked.dropped.split()))} | {regret:.3f} |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    number = float(value)  # type: ignore[arg-type]
    if np.isnan(number):
        return ""
    return str(int(number)) if number == int(number) else f"{number:.3f}" if number < 100 else f"{number:.1f}"


if __name__ == "__main__":
    main()
