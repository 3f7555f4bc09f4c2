"""How fast an adapter is trained by distillation, and in how much memory, beside others and beside the geometry.

  python bench/distillation.py --model random      # 32 layers, B 21-24, C 25-28; 8 windows of 512 tokens, seen twice
  python bench/distillation.py --model smollm2     # SmolLM2-135M, B 12-15, C 16-19; 16 windows of 256 tokens
  python bench/distillation.py --model random --step --contenders        # a step beside its bare matrix products
  python bench/distillation.py --model random --contenders ours plain trl liger

The contenders run in turn, each in a process of its own, `--repeats` times, in float32 on the CPU; OMP_NUM_THREADS says
with how many threads. Time is of the whole process, from its start to its end; memory is its largest resident size.
Ratios are medians over the turns. Those of CPU seconds stand beside those of seconds, for a machine that others use.

  ours    the training command, with the states of teacher and frozen layers in files. A finds none; B and C find what
          the parts before them left
  again   ours with a second seed, which finds all of its files
  alone   C, which finds the teacher's states alone
  plain   transformers and PEFT: dense model and student in memory, whole logits, the teacher in every step
  trl     TRL's GKDTrainer with lmbda 0 and beta 0, in an environment of its own. Its loss is the forward KL alone, at
          temperature 1 whatever it is told: no cross-entropy, so a little less work
  liger   Liger's chunked loss without compilation beside ours, the loss alone, at temperature 1. It computes the
          gradient of the head's weights too, which nobody trains here

Plain's losses must be ours: both see the same windows in the same order, from the same first weights. Bounds are ratios
of multiply-adds of matrix products (bench/distillation_bound.py). Merges between the parts are not measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from distillation_bound import Geometry, Work, weight_bytes, work
from distillation_case import KINDS, Case, prepare
from other_packages import environment

from mistral_prune_lora.errors import reports_errors

CONTENDERS = ("ours", "again", "alone", "plain", "trl", "liger")
# How many times as fast as plain, and at most how much of its memory, with the random model.
TARGETS = {("ours", "A"): 1.2, ("ours", "B"): 2.3, ("ours", "C"): 2.8}
TARGETS |= {("again", "A"): 1.5, ("again", "B"): 3.5, ("again", "C"): 3.5}
MEMORY_TARGET, STEP_TARGET = 0.5, 1.25
SAME_LOSS = 1e-3  # relative, of plain's last losses and ours: both have float32's noise behind them
WORKERS = Path(__file__).with_name("distillation_workers.py")


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        seconds: wall clock, of its whole process.
        cpu_seconds: of its process, user and system: what others do on the machine lengthens these least.
        peak: bytes resident at the highest.
        losses: of its steps.
    """

    seconds: float
    cpu_seconds: float
    peak: int
    losses: list[float]


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=tuple(KINDS), required=True)
    p.add_argument("--parts", nargs="+", choices="ABC", default=list("ABC"), help="(default: all)")
    p.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=["ours", "again", "alone", "plain"],
        help="(default: all that need nothing installed)")  # fmt: skip
    p.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    p.add_argument("--windows", type=int, help="windows (default: the model's, see above)")
    p.add_argument("--seqlen", type=int, help="token ids in a window (default: the model's)")
    p.add_argument("--step", action="store_true", help="also time one step beside its matrix products")
    p.add_argument("--folder", type=Path, help="where models and states are put (default: a temporary folder)")
    p.add_argument("--json", type=Path, help="write every run here")
    return p


@reports_errors
def main() -> None:
    parser = main_parser()
    args = parser.parse_args()
    if "again" in args.contenders and "ours" not in args.contenders:
        parser.error("again goes on with the files that ours left: name both")
    others = environment("trl") if {"trl", "liger"} & set(args.contenders) else None
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        case = prepare(args.model, Path(folder), args.parts, args.windows, args.seqlen)
        file = case.save()
        trained = [name for name in CONTENDERS if name in args.contenders and name != "liger"]
        turns: list[dict[tuple[str, str], Run]] = []
        for number in range(args.repeats if trained else 0):
            turns.append(turn(case, file, args.parts, trained, others))
            report(case, args.model, turns, f"{number + 1} of {args.repeats} turns")
        if "liger" in args.contenders and others:
            report_loss(file, others, args.repeats)
        if args.step:
            for part in args.parts:
                report_step(file, part)
    if args.json:
        told = [{f"{name} {part}": asdict(run) for (name, part), run in runs.items()} for runs in turns]
        args.json.write_text(json.dumps({"case": asdict(case), "turns": told}, indent=2) + "\n", encoding="utf-8")


def turn(
    case: Case, file: Path, parts: Sequence[str], contenders: Sequence[str], others: Path | None
) -> dict[tuple[str, str], Run]:
    """Every contender once for every part; files that one part leaves for another are those of this turn."""
    folder, runs = Path(case.folder) / "turn", {}
    for part in parts:
        for name in contenders:
            output = folder / f"{name}-{part}"
            output.parent.mkdir(exist_ok=True)
            if name in ("plain", "trl"):
                python = others if name == "trl" and others else sys.executable
                told, run = watched([python, WORKERS, name, file, part, output])
                run = replace(run, losses=json.loads(told.splitlines()[-1])["losses"])
            elif name == "alone" and part != "C":
                continue
            else:
                _, run = watched(ours(case, folder, part, output, name))
                run = replace(run, losses=losses(output))
            runs[name, part] = run
            print(
                f"{name:<6} {part} {run.seconds:8.1f} s {run.cpu_seconds:8.1f} CPU s {run.peak / 1e6:8.0f} MB",
                flush=True,
            )
    shutil.rmtree(folder)
    return runs


def ours(case: Case, folder: Path, part: str, output: Path, name: str) -> list[str]:
    """The training command with the files that this contender finds or leaves."""
    teacher = folder / "teacher.states"
    if part != "A" and not teacher.is_file():
        # A is not among the parts that are measured.
        shutil.copy2(case.teacher_states, teacher)
    words = [*case.command(part, output, seed=int(name == "again")), "--teacher_states", str(teacher)]
    if part == "A":
        return words
    prefix = folder / f"prefix-{part}{'-alone' if name == 'alone' else ''}.states"
    words += ["--prefix_states", str(prefix)]
    before = folder / "prefix-B.states"
    if part == "C" and name == "ours" and before.is_file():
        words += ["--prefix_from", str(before)]
    return words


def watched(command: Sequence) -> tuple[str, Run]:
    """Run a command; returns what it prints on stdout, and its time and memory."""
    spent, began, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(word) for word in command], stdout=told, stderr=errors)
        # Not wait4's ru_maxrss: that starts from the size of the process that forked, which is this one.
        while process.poll() is None:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.02)
        seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime
        errors.seek(0)
        told.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{errors.read()}")
        return told.read(), Run(seconds, cpu, peak, [])


def high_water(pid: int) -> int:
    """The largest resident size that a process has had since its exec, in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def losses(adapter: Path) -> list[float]:
    """Of an adapter that the command wrote."""
    head, *rows = (adapter / "training.csv").read_text(encoding="utf-8").splitlines()
    column = head.split(",").index("loss")
    return [float(row.split(",")[column]) for row in rows]


def bounds(case: Case) -> dict[str, Work]:
    """What each part must compute."""
    geometry, found, reached = Geometry(**case.geometry), {}, 0
    for part, given in case.parts.items():
        adapted = [given.active[number] for number in given.adapted]
        found[part] = work(
            geometry,
            given.active,
            adapted,
            seqlen=case.seqlen,
            passes=case.steps / case.windows,
            rank=case.lora["rank"],
            teacher_made_here=part == "A",
            reached=reached,
        )
        # A's states would be those of the embedding: nobody writes them.
        reached = given.active.index(min(adapted))
    return found


def report(case: Case, model: str, turns: list[dict[tuple[str, str], Run]], title: str) -> None:
    """The contenders as markdown, with what they are to be measured by."""
    needed = bounds(case)
    print(f"\n{model}, {title}; {case.windows} windows of {case.seqlen} tokens, {case.steps} steps;", end=" ")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| part | contender | seconds | median | plain / it | CPU | bound | wanted | MB | of plain's | last loss |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, part in sorted(turns[0], key=lambda key: (key[1], CONTENDERS.index(key[0]))):
        wanted = TARGETS.get((name, part)) if model == "random" else None
        print(row(turns, name, part, needed[part], wanted))
    for part in sorted({part for _, part in turns[0]}):
        pair = [turns[0].get((name, part)) for name in ("ours", "plain")]
        if pair[0] and pair[1]:
            off = max(abs(a / b - 1) for a, b in zip(pair[0].losses, pair[1].losses, strict=True))
            print(f"losses of {part}: ours and plain differ by {off:.1e} at most{verdict(off <= SAME_LOSS)}")
        print(weights(case, part))
    print(flush=True)


def row(turns: list[dict[tuple[str, str], Run]], name: str, part: str, needed: Work, wanted: float | None) -> str:
    """One contender's line; its ratios to plain are medians over the turns, by wall clock and by CPU seconds."""
    runs, beside = ([runs[who, part] for runs in turns if (who, part) in runs] for who in (name, "plain"))
    peak, faster, cpu, share = max(run.peak for run in runs), "", "", ""
    if beside:
        pairs = list(zip(beside, runs, strict=True))
        ratio = statistics.median(plain.seconds / run.seconds for plain, run in pairs)
        faster = f"{ratio:.2f}" + (verdict(ratio >= wanted) if wanted else "")
        cpu = f"{statistics.median(plain.cpu_seconds / run.cpu_seconds for plain, run in pairs):.2f}"
        of_plain = peak / max(plain.peak for plain in beside)
        share = f"{of_plain:.2f}" + (verdict(of_plain <= MEMORY_TARGET) if wanted else "")
    amount = {"ours": needed.first, "again": needed.later, "alone": needed.alone}.get(name)
    bound = f"{needed.plain / amount:.2f}" if amount else ""
    seconds, middle = ", ".join(f"{run.seconds:.1f}" for run in runs), statistics.median(run.seconds for run in runs)
    cells = [part, name, seconds, f"{middle:.1f}", faster, cpu, bound, f"{wanted}" if wanted else ""]
    return f"| {' | '.join([*cells, f'{peak / 1e6:.0f}', share, f'{runs[-1].losses[-1]:.6f}'])} |"


def weights(case: Case, part: str) -> str:
    """What the weights alone take: of both models, and of what a training from stored states needs."""
    geometry, given = Geometry(**case.geometry), case.parts[part]
    both = weight_bytes(geometry, geometry.layers) + weight_bytes(geometry, len(given.active))
    above = weight_bytes(geometry, len(given.active) - given.adapted[0], embeddings=0, heads=2)
    told = f"{both / 1e6:.0f} MB of teacher and student"
    return f"weights of {part}: {told}, {above / 1e6:.0f} MB from the first adapted layer on, with both heads"


def report_loss(file: Path, others: Path, repeats: int) -> None:
    """Liger's loss beside ours."""
    turns = []
    for _ in range(repeats):
        pair = [watched([python, WORKERS, name, file])[0] for name, python in
                (("loss_ours", sys.executable), ("loss_liger", others))]  # fmt: skip
        turns.append([json.loads(told.splitlines()[-1]) for told in pair])
    print("head and loss of one window, forward and gradient of the hidden states, temperature 1:")
    for name, index in (("ours", 0), ("liger", 1)):
        each = [pair[index] for pair in turns]
        print(
            f"  {name:<6} {statistics.median(e['seconds'] for e in each) * 1e3:8.1f} ms"
            f"  {max(e['taken'] for e in each) / 1e6:8.0f} MB beside its inputs"
            f"  loss {each[0]['loss']:.6f}  gradient {each[0]['gradient']:.6f}"
        )
    print(f"  liger / ours: {statistics.median(b['seconds'] / a['seconds'] for a, b in turns):.2f}", flush=True)


def report_step(file: Path, part: str) -> None:
    """A step beside its products, in one process."""
    told, _ = watched([sys.executable, Path(__file__).with_name("distillation_step.py"), file, part])
    found = json.loads(told.splitlines()[-1])
    print(
        f"step of {part}: {found['step'] * 1e3:.0f} ms, its matrix products {found['products'] * 1e3:.0f} ms,"
        f" ratio {found['ratio']:.3f}{verdict(found['ratio'] <= STEP_TARGET)} (at most {STEP_TARGET});"
        f" weights {found['weights'] / 1e6:.0f} MB, kept for the backward pass {found['kept'] / 1e6:.0f} MB"
    )
    for share, name in found["other"]:
        print(f"  {share:6.1%} {name}")


def verdict(holds: bool) -> str:
    return " ok" if holds else " MISSED"


if __name__ == "__main__":
    sys.exit(main())
