"""The command that computes an adapter in closed form: `python -m mistral_prune_lora.closed_form --help`."""

from __future__ import annotations

import argparse
import sys

from mistral_prune_lora.argument_types import not_negative, positive, positive_number, size_in_bytes
from mistral_prune_lora.closed_form.settings import TOKEN_WEIGHTS, CalibrationText, ClosedFormSettings
from mistral_prune_lora.errors import PipelineError, reports_errors
from mistral_prune_lora.quick_imports import quick_imports

_EPILOG = """examples:
  A's adapter, without training, on the pruned model:
    python -m mistral_prune_lora.closed_form --part A --dense ./Mistral-7B-v0.1 \\
      --student ./25_mistral_results/pruning/A --calibrate wikitext2 --output_dir ./adapters/A_lora
  on two texts, the second counting twice as much, small enough for a fast start:
    python -m mistral_prune_lora.closed_form --part A --dense ./Mistral-7B-v0.1 \\
      --student ./25_mistral_results/pruning/A --calibrate wikitext2 --calibrate ./mine.jsonl=2 --rank 64 \\
      --output_dir ./adapters/A_lora
  B's, on the merged A with bundle B restored, while C is missing:
    python -m mistral_prune_lora.closed_form --part B --dense ./Mistral-7B-v0.1 --student ./merged/A_merged \\
      --bundle ./25_mistral_results/pruning/bundles/B --calibrate wikitext2 --output_dir ./adapters/B_lora

The adapter corrects what its texts show it: calibrate on texts like those that the model will meet, and measure on one
that it was not calibrated on.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.closed_form",
        description="Compute a LoRA adapter without training: what a cut takes from the stream of hidden states,"
        " regressed on what enters down_proj of the last layer before it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--part", required=True, choices="ABC", help="the part that is corrected")
    p.add_argument("--dense", required=True, metavar="MODEL", help="the dense model: a directory or a Hub id")
    p.add_argument("--student", required=True, metavar="DIR", help="the pruned A for part A, else the merged A")
    p.add_argument("--bundle", action="append", default=[], metavar="DIR",
        help="a bundle to restore, as for training; may be repeated")  # fmt: skip
    p.add_argument("--output_dir", required=True, metavar="DIR", help="the adapter's directory")
    p.add_argument("--overwrite", action="store_true",
        help="replace what is there even if it is no such adapter; never an input")  # fmt: skip
    text = p.add_argument_group("texts")
    text.add_argument("--calibrate", action="append", required=True, metavar="TEXT[=WEIGHT]",
        help="wikitext2, c4, ptb, pydoc or a path, of its training split; may be repeated, and each counts by its"
        " weight (default: 1) however long it is")  # fmt: skip
    text.add_argument("--mirror", metavar="DIR", help="a local copy of a single dataset (default: the Hub)")
    text.add_argument("--seqlen", type=positive, default=512, metavar="N",
        help="tokens in a window (default: %(default)s)")  # fmt: skip
    text.add_argument("--nsamples", type=positive, default=128, metavar="N",
        help="windows of each text to solve for (default: %(default)s)")  # fmt: skip
    text.add_argument("--held_out", type=not_negative, default=32, metavar="N",
        help="windows of each text behind those, to choose the ridge on (default: %(default)s)")  # fmt: skip
    fit = p.add_argument_group("adapter")
    fit.add_argument("--rank", type=positive, metavar="N", help="of the adapter (default: as large as it can be)")
    fit.add_argument("--ridge", type=positive_number, metavar="X",
        help="as a multiple of the mean square of a feature (default: by held-out windows)")  # fmt: skip
    fit.add_argument("--layers_behind", type=not_negative, default=ClosedFormSettings.layers_behind, metavar="N",
        help="correct so many layers behind each cut, too (default: %(default)s)")  # fmt: skip
    fit.add_argument("--token_weights", choices=TOKEN_WEIGHTS, default=ClosedFormSettings.token_weights,
        help="divide a token's squared error by the length of what is wanted there, or do not"
        " (default: %(default)s)")  # fmt: skip
    run = p.add_argument_group("machine")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda:N (default: %(default)s)")
    run.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16",
        help="of weights and stream; sums are in float64 (default: %(default)s)")  # fmt: skip
    run.add_argument(
        "--batch_size", type=positive, default=4, metavar="N", help="windows at once (default: %(default)s)"
    )
    run.add_argument("--max_memory", type=size_in_bytes, metavar="SIZE",
        help="for weights and hidden states, such as 6GB (default: a share of what is free)")  # fmt: skip
    return p


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parser().parse_args(argv)
    texts = [_text(each) for each in given.calibrate]
    if given.mirror and len(texts) > 1:
        raise PipelineError("a mirror is of one dataset, and several are named", where="--mirror", mend="name paths")
    with quick_imports():
        from mistral_prune_lora.checkpoints.model_place import model_directory
        from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
        from mistral_prune_lora.closed_form.solve import ClosedForm
        from mistral_prune_lora.closed_form.written import RECORD, write_closed_form
        from mistral_prune_lora.distillation.student import Student
        from mistral_prune_lora.distillation.teacher_record import check_teacher
        from mistral_prune_lora.storage.outputs import Output, claim
        from mistral_prune_lora.storage.transaction import check_place
        from mistral_prune_lora.streaming.compute import Compute

    settings = ClosedFormSettings(given.rank, given.ridge, given.layers_behind, given.token_weights)
    read = [given.dense, given.student, *given.bundle, *(name for name, _ in texts), given.mirror]
    claim([Output.directory(given.output_dir, "--output_dir", RECORD)], read, overwrite=given.overwrite)
    check_place(given.output_dir)
    dense = model_directory(given.dense)
    check_teacher(dense, given.student)
    student, tokenizer = Student(given.student, tuple(given.bundle)), load_tokenizer(dense)
    student.layers(given.part)  # refused before a text is fetched
    calibration = [
        CalibrationText(_windows(name, given, tokenizer), given.held_out, weight) for name, weight in texts
    ]  # fmt: skip
    compute = Compute.named(given.device, given.dtype, given.batch_size, given.max_memory)
    closed_form = ClosedForm(given.part, student, dense, calibration, settings, compute)
    write_closed_form(closed_form, given.output_dir, overwrite=given.overwrite)
    print(f"adapter of {given.part}: {given.output_dir}")


def _text(told: str) -> tuple[str, float]:
    """A text's name and weight: what stands behind the last equals sign, if that is a number."""
    name, sign, weight = told.rpartition("=")
    try:
        return (name, positive_number(weight)) if sign and name else (told, 1.0)
    except argparse.ArgumentTypeError:
        return told, 1.0


def _windows(name: str, given: argparse.Namespace, tokenizer):
    from mistral_prune_lora.text.sources import load_text
    from mistral_prune_lora.text.windows import make_windows

    text = load_text(name, split="train", mirror=given.mirror)
    return make_windows(text, tokenizer, seqlen=given.seqlen, max_windows=given.nsamples + given.held_out)


if __name__ == "__main__":
    sys.exit(main())
