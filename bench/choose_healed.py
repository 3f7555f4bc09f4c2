"""What healing makes of the blocks that could be dropped: KL from the dense model of each, healed in two equal ways.

  python bench/choose_healed.py --model resources/models/smollm2-135m --table choice.csv --output healed.csv

Every block of a `choice.csv` of the example's model is cut out and corrected in closed form (84 windows of Python's
language reference, 16 more choose the ridge); a block that leaves no layer before it cannot be. The `--best` blocks of
each ranking (KL, angular distance, block influence, KL in closed form) are trained from nothing, too, all alike. Both
are measured on pages that neither has seen. The CSV has the columns `dropped`, `closed_form` and, after training,
`kl_dense`, which
`bench/choose_layers.py --healed` sets beside the rankings; rows that it has already are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch
from closed_form import scored
from distillation_losses import LOSSES, Bench

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.closed_form.settings import CalibrationText, ClosedFormSettings
from mistral_prune_lora.closed_form.solve import ClosedForm
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.run import run_to_file
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import Windows, make_windows

RANKINGS = ("rank", "angular_rank", "influence_rank")
SOLVED, HELD_OUT, SEQLEN = 84, 16, 256


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="the dense model of the example")
    p.add_argument("--table", type=Path, required=True, help="the choice.csv with the blocks and their ranks")
    p.add_argument("--output", type=Path, required=True, help="the CSV; rows that are there are not made again")
    p.add_argument("--best", type=int, default=5, help="blocks of each ranking that are trained (default: %(default)s)")
    p.add_argument("--steps", type=int, default=60, help="of one window (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2)
    return p


class Healer:
    """The dense model's answers, and the two ways of healing."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._model, self._folder = args.model, folder
        self._compute = Compute(torch.device("cpu"), torch.float32, 4)
        trained = {"other": None, "windows": 16, "seqlen": SEQLEN, "rank": 16, "learning_rate": 4e-3}
        self._bench = Bench(argparse.Namespace(model=args.model, steps=args.steps, **trained), folder)
        windows = make_windows(
            load_text("pydoc", split="train"),
            load_tokenizer(args.model),
            seqlen=SEQLEN,
            max_windows=SOLVED + HELD_OUT,
        )
        self._text = CalibrationText(windows, HELD_OUT)
        self._dense = open_checkpoint(args.model)
        self._answers = DenseAnswers(self._dense, folder / "answers.safetensors")
        passage = Passage(self._dense, self._measured, self._compute)
        sources = [LayerSource(index, self._dense) for index in self._dense.layers]
        run_to_file(passage, passage.origin(None), sources, self._answers.hidden)

    @property
    def _measured(self) -> Windows:
        return self._bench.measured["own"][0].windows

    def pruned(self, dropped: tuple[int, ...]) -> Path:
        """Cut a block out."""
        place = self._folder / "pruned"
        prune_model(
            self._model,
            Layout(30, dropped[:4], dropped[4:]),
            save_dir=place / "A",
            save_removed_dir=place / "bundles",
            overwrite=True,
        )
        return place / "A"

    def closed_form(self, pruned: Path) -> float:
        """KL in closed form. Passes through layers that candidates share are made once."""
        (self._folder / "passes").mkdir(exist_ok=True)
        made = ClosedForm("A", Student(pruned), self._model, [self._text], ClosedFormSettings(), self._compute)
        by_layer = {each.layer: (each,) for each in made.corrections(self._folder / "passes")}
        model = open_checkpoint(pruned)
        sources = [LayerSource(index, model, by_layer.get(index, ())) for index in model.layers]
        passage = Passage(model, self._measured, self._compute)
        scores = scored(passage, passage.origin(None), sources, self._answers, self._folder / "journal")
        return float(scores.kl.mean()) / (SEQLEN - 1)

    def trained(self, pruned: Path) -> float:
        """KL after training from nothing."""
        return self._bench.train(pruned, LOSSES["0.9 KL + 0.1 CE, T 1"], seed=0)["own_kl"]


@reports_errors
def main() -> None:
    args = main_parser().parse_args()
    torch.set_num_threads(args.threads)
    table = pd.read_csv(args.table)
    table = table[table.kind == "block"]
    best = set().union(*(table.nsmallest(args.best, ranking).dropped for ranking in RANKINGS))
    known = pd.read_csv(args.output).to_dict("records") if args.output.exists() else []
    rows = {row["dropped"]: row for row in known}

    def add(words: str, column: str, found: float) -> None:
        rows[words] = rows.get(words, {"dropped": words}) | {column: found}
        pd.DataFrame(rows.values()).to_csv(args.output, index=False)
        print(rows[words], flush=True)

    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        healer = Healer(args, Path(folder))
        blocks = {words: tuple(map(int, words.split())) for words in table.dropped}
        for words in sorted(blocks, key=lambda each: blocks[each]):
            if blocks[words][0] and pd.isna(rows.get(words, {}).get("closed_form")):
                add(words, "closed_form", healer.closed_form(healer.pruned(blocks[words])))
        best |= set(pd.DataFrame(rows.values()).nsmallest(args.best, "closed_form").dropped)
        for words in sorted(best, key=lambda each: blocks[each]):
            if pd.isna(rows.get(words, {}).get("kl_dense")):
                add(words, "kl_dense", healer.trained(healer.pruned(blocks[words])))


if __name__ == "__main__":
    main()
