"""Which loss heals best: one part's adapter, trained with each of several losses, measured on two texts.

  python bench/distillation_losses.py --model resources/models/smollm2-135m --other wiki.parquet --output losses.csv

Part A is trained as the example's configuration has it (its own text, rank, steps and learning rate unless an option
says otherwise), three seeds each, and measured on windows of the example's test text and of another, which was not
trained on. A row of the CSV is one training; at the end a table of means over seeds is printed. Rows that the CSV has
already are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Shelf
from mistral_prune_lora.distillation.curve import COLUMNS, HELD_OUT_COLUMNS, Table
from mistral_prune_lora.distillation.held_out import HeldOut
from mistral_prune_lora.distillation.loop import Loop, Watch
from mistral_prune_lora.distillation.ranks import Ranks
from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings, OptimiserSettings, TrainingSettings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher import Teacher, TeacherFiles
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import Windows, make_windows

LOSSES = {
    "0.5 KL + 0.5 CE, T 2": LossSettings(0.5, 2.0),
    "KL, T 1": LossSettings(1.0, 1.0),
    "0.9 KL + 0.1 CE, T 1": LossSettings(0.9, 1.0),
    "0.5 KL + 0.5 CE, T 1": LossSettings(0.5, 1.0),
    "KL, T 2": LossSettings(1.0, 2.0),
    "reverse KL, T 1": LossSettings(1.0, 1.0, "reverse_kl"),
    "JS, T 1": LossSettings(1.0, 1.0, "js"),
    "CE": LossSettings(0.0, 1.0),
}
B, C = (12, 13, 14, 15), (16, 17, 18, 19)


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="the dense model of the example")
    p.add_argument("--other", type=Path, help="another text to measure on: a parquet, json, csv or txt file")
    p.add_argument("--output", type=Path, required=True, help="the CSV; rows that are there are not made again")
    p.add_argument("--losses", nargs="+", choices=tuple(LOSSES), default=list(LOSSES))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--learning_rate", type=float, default=4e-3)
    p.add_argument("--seqlen", type=int, default=256)
    p.add_argument("--windows", type=int, default=16, help="measured of each text (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2)
    return p


class Bench:
    """The teacher's answers to all windows, and what is trained on them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Run the dense model `args.model` over windows of the example's texts and of `args.other`."""
        self._args, self._folder = args, folder
        self._compute = Compute(torch.device("cpu"), torch.float32, 4)
        tokenizer = load_tokenizer(args.model)
        texts = {"own": load_text("pydoc", split="test")}
        texts |= {"other": load_text(str(args.other))} if args.other else {}
        self.shelf, self.teacher = self._taught("train", self._cut(load_text("pydoc", split="train"), tokenizer, 100))
        self.measured = {name: self._taught(name, self._cut(t, tokenizer, args.windows)) for name, t in texts.items()}

    def _cut(self, text, tokenizer, count: int) -> Windows:
        return make_windows(text, tokenizer, seqlen=self._args.seqlen, max_windows=count)

    def _taught(self, name: str, windows: Windows) -> tuple[Shelf, Teacher]:
        states = self._folder / f"{name}.safetensors"
        teacher_states(self._args.model, windows, states, compute=self._compute)
        teacher = Teacher(TeacherFiles(self._args.model, states), windows, torch.float32, "cpu")
        return Shelf(windows, self._compute.device, taught=teacher.states), teacher

    def train(self, pruned: Path, loss: LossSettings, seed: int) -> dict[str, float]:
        """Train the A of a pruned model once; PPL and KL by text."""
        args = self._args
        optimiser = OptimiserSettings(args.steps, 1, 1, args.learning_rate, max(1, args.steps // 20))
        settings = TrainingSettings(LoraSettings(args.rank, 2 * args.rank), loss, optimiser, seed=seed)
        student = Student(pruned)
        adapted = AdaptedStudent(student, student.layers("A"), settings, self._compute)
        watch = Watch(Table(None, COLUMNS), Table(None, HELD_OUT_COLUMNS))
        Loop(adapted, self.teacher, replace(self.shelf), None, settings, watch, Ranks()).run()
        found = {}
        for name, (shelf, teacher) in self.measured.items():
            score = HeldOut(shelf, teacher, Ranks()).score(adapted)
            found |= {f"{name}_ppl": score.ppl, f"{name}_kl": score.kl, f"{name}_agreement": score.agreement}
        return found


@reports_errors
def main() -> None:
    args = main_parser().parse_args()
    torch.set_num_threads(args.threads)
    key = ["loss", "seed", "steps", "rank", "learning_rate"]
    rows = pd.read_csv(args.output).to_dict("records") if args.output.exists() else []
    known = {tuple(row[name] for name in key) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        bench, pruned = Bench(args, Path(folder)), Path(folder) / "pruned" / "A"
        prune_model(args.model, Layout(30, B, C), save_dir=pruned, save_removed_dir=pruned.with_name("bundles"))
        for seed in args.seeds:
            for name in args.losses:
                what = (name, seed, args.steps, args.rank, args.learning_rate)
                if what in known:
                    continue
                rows.append(dict(zip(key, what, strict=True)) | bench.train(pruned, LOSSES[name], seed))
                pd.DataFrame(rows).to_csv(args.output, index=False)
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby(["steps", "rank", "learning_rate", "loss"]).agg(["mean", "std"])
    print(table.drop(columns="seed").to_string(float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main()
