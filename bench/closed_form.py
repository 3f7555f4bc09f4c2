"""What an adapter in closed form is worth, without training: KL and PPL on the text it is calibrated on and another.

  python bench/closed_form.py --model resources/models/smollm2-135m --other wiki.parquet --output closed_form.csv

Layers 12-19 of the built-in model are dropped; A's last layer before the cut is corrected in several ways, each solved
for three choices of 100 windows of 256 tokens of Python's language reference (16 more choose the ridge), measured on
windows of other pages of it and of another text. With --mix, that other text's beginning is calibrated on as well, half
and half; it is measured on its end.

  pruned      nothing is corrected
  outputs     least squares on what leaves down_proj, as ReplaceMe has it (https://arxiv.org/abs/2505.02819)
  features    ridge regression on what enters down_proj; `features-16` reduced to rank 16, and so on
  behind      features, and the first layer behind the cut too
  equal       features, all tokens counting alike, as they do for `outputs`
  mix         features, calibrated on both texts

A row of the CSV is one measurement; at the end a table of means over the choices is printed, with their standard
deviations, and the seconds that the passes and the solving took.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.closed_form.calibration import Calibration
from mistral_prune_lora.closed_form.correction import Correction
from mistral_prune_lora.closed_form.regression import Moments, factors
from mistral_prune_lora.closed_form.settings import CalibrationText, ClosedFormSettings
from mistral_prune_lora.closed_form.solve import ClosedForm
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.evaluation.scoring import DenseAnswers, Scoring
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.results.statistics import WindowScores, summarise
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.passage import Origin, Passage
from mistral_prune_lora.streaming.run import run_layers, run_to_file
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import Windows, make_windows, windows_between

B, C = (12, 13, 14, 15), (16, 17, 18, 19)
BEFORE, BEHIND = 11, 20
RANKS = (16, 64, 128, 256)
SOLVED, HELD_OUT, MEASURED, SEQLEN = 100, 16, 16, 256
STARTS = (0, 29, 58)  # of the text's 175 windows


def main_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="the dense model of the example")
    p.add_argument("--other", type=Path, required=True, help="another text: a parquet, json, csv or txt file")
    p.add_argument("--output", type=Path, required=True, help="the CSV")
    p.add_argument("--mix", action="store_true", help="calibrate on both texts, too")
    p.add_argument("--choices", type=int, default=3, choices=range(1, 4), help="of windows (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2)
    return p


class Bench:
    """The pruned model, and windows of both texts with the dense model's answers."""

    def __init__(self, model: Path, other: Path, folder: Path) -> None:
        self._folder, self._compute = folder, Compute(torch.device("cpu"), torch.float32, 4)
        self._dense, self._a = open_checkpoint(model), folder / "pruned" / "A"
        prune_model(model, Layout(30, B, C), save_dir=self._a, save_removed_dir=folder / "pruned" / "bundles")
        tokenizer = load_tokenizer(model)
        cut = make_windows(load_text(str(other)), tokenizer, seqlen=SEQLEN, max_windows=SOLVED + HELD_OUT + MEASURED)
        count = SOLVED + HELD_OUT
        self.calibrated = make_windows(load_text("pydoc", split="train"), tokenizer, seqlen=SEQLEN)
        self.mixed = windows_between(cut, 0, count)
        own = make_windows(load_text("pydoc", split="test"), tokenizer, seqlen=SEQLEN, max_windows=MEASURED)
        self._measured = {"own": own, "other": windows_between(cut, count, count + MEASURED)}
        for name, windows in self._measured.items():
            passage = Passage(self._dense, windows, self._compute)
            dense = [LayerSource(index, self._dense) for index in range(30)]
            run_to_file(passage, passage.origin(None), dense[:BEFORE], folder / f"{name}.below")
            run_to_file(passage, passage.origin(folder / f"{name}.below"), dense[BEFORE:], folder / f"{name}.final")

    def corrections(self, texts: list[CalibrationText], **settings) -> list[Correction]:
        """Ours, by the library's way."""
        wanted = ClosedFormSettings(**settings)
        closed_form = ClosedForm("A", Student(self._a), self._dense.path, texts, wanted, self._compute)
        return closed_form.corrections(self._folder)

    def on_outputs(self, text: CalibrationText) -> list[Correction]:
        """Least squares on what leaves down_proj, by the same moments: its outputs are features times W."""
        moments = self._moments(text)
        weight = self._dense.read(f"model.layers.{BEFORE}.mlp.down_proj.weight", torch.float64)
        gram, cross = weight @ moments.gram @ weight.T, weight @ moments.cross
        found = weight.T @ torch.linalg.lstsq(gram, cross, driver="gelsd").solution
        print(f"outputs: {moments.loss(found) / moments.energy:.4f} is left of what is lacking", flush=True)
        a, b = factors(found, found.shape[1])
        return [Correction(BEFORE, a, b, {"residual": moments.loss(found) / moments.energy})]

    def _moments(self, text: CalibrationText) -> Moments:
        student = open_checkpoint(self._a)
        passages = [Passage(model, text.windows, self._compute) for model in (student, self._dense)]
        calibration = Calibration(text, passages[0], passages[1], self._folder)
        below = [LayerSource(index, student) for index in range(BEFORE)]
        wanted = calibration.wanted([LayerSource(index, self._dense) for index in range(BEHIND)])
        return calibration.moments(calibration.entering(below), LayerSource(BEFORE, student), wanted, "equal")[0]

    def measure(self, corrections: list[Correction]) -> dict[str, float]:
        """KL and PPL of A on both texts."""
        found, by_layer = {}, {each.layer: (each,) for each in corrections}
        model = open_checkpoint(self._a)
        sources = [LayerSource(i, model, by_layer.get(i, ())) for i in (BEFORE, *range(BEHIND, 30))]
        for name, windows in self._measured.items():
            passage = Passage(model, windows, self._compute)
            origin = passage.origin(self._folder / f"{name}.below")
            answers = DenseAnswers(self._dense, self._folder / f"{name}.final")
            scores = scored(passage, origin, sources, answers, self._folder / "journal")
            told = summarise(scores, predicted_per_window=SEQLEN - 1, tokens_per_byte=None)
            found |= {f"{name}_kl": told["kl_dense"], f"{name}_ppl": told["ppl"]}
        return found


def scored(
    passage: Passage, origin: Origin, sources: Sequence[LayerSource], answers: DenseAnswers, journal: Path
) -> WindowScores:
    """The scores of windows that go through the last layers of a model; nothing is left at `journal`."""
    record = origin.record.after(sources, passage.compute)
    with Scoring(passage, journal, record, "measure", dense=answers) as scoring:
        run_layers(passage, origin, sources, scoring)
        scores = scoring.finish()
        scoring.forget()
    return scores


def calibration(windows: Windows, start: int = 0) -> CalibrationText:
    """A choice of windows: those to solve for from a start on, and those held out behind them."""
    return CalibrationText(windows_between(windows, start, start + SOLVED + HELD_OUT), HELD_OUT)


@reports_errors
def main() -> None:
    args = main_parser().parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.model, args.other, Path(folder))

        def add(way: str, choice: int, corrections: list[Correction], seconds: float) -> None:
            residuals = [each.about["residual"] for each in corrections]
            told = {"way": way, "choice": choice, "seconds": seconds, "residual": residuals[0] if residuals else 1.0}
            rows.append(told | bench.measure(corrections))
            pd.DataFrame(rows).to_csv(args.output, index=False)
            print(rows[-1], flush=True)

        add("pruned", 0, [], 0.0)
        for choice, start in enumerate(STARTS[: args.choices]):
            text = calibration(bench.calibrated, start)
            ways = {"features": {}, **{f"features-{rank}": {"rank": rank} for rank in RANKS}}
            ways |= {"behind": {"layers_behind": 1}, "equal": {"token_weights": "equal"}}
            for way, settings in ways.items():
                started = time.monotonic()
                corrections = bench.corrections([text], **settings)
                add(way, choice, corrections, time.monotonic() - started)
            add("outputs", choice, bench.on_outputs(text), 0.0)
            if args.mix:
                both = [text, calibration(bench.mixed)]
                add("mix", choice, bench.corrections(both), 0.0)
    table = pd.DataFrame(rows).groupby("way").agg(["mean", "std"]).drop(columns="choice")
    print(table.to_string(float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main()
