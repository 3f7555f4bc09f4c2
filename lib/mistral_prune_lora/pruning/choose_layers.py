"""The command that chooses layers by measured damage: `python -m mistral_prune_lora.pruning.choose_layers --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_prune_lora.argument_types import positive, seed, size_in_bytes
from mistral_prune_lora.choosing.settings import METHODS, SPLITS, ChoiceSettings
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.layout.partition import spans
from mistral_prune_lora.quick_imports import quick_imports

if TYPE_CHECKING:
    from mistral_prune_lora.choosing.choose import Choice

_SHOWN = 5  # candidates of a kind on the screen
_EPILOG = """examples:
  which 8 layers of Mistral-7B to drop, and which 4 of them to restore first:
    python -m mistral_prune_lora.pruning.choose_layers --model ./Mistral-7B-v0.1 --drop 8 --keep_last_layer \\
      --dataset wikitext2 --output_dir ./choice
  sooner, with candidates dropped on the way that are surely worse than the best:
    python -m mistral_prune_lora.pruning.choose_layers --model ./Mistral-7B-v0.1 --drop 8 --keep_last_layer \\
      --dataset wikitext2 --nsamples 64 --race 8 --output_dir ./choice
  single layers anywhere, one after the other, and every way to part them:
    python -m mistral_prune_lora.pruning.choose_layers --model ./Mistral-7B-v0.1 --drop 8 --keep_last_layer \\
      --dataset wikitext2 --method greedy --splits all --output_dir ./choice

choice.csv has every candidate, choice.json what was chosen and everything that it hangs on, choice.svg shows it. The
workflow takes the choice with `layers: {choice: ./choice/choice.json}`.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.pruning.choose_layers",
        description="Choose the layers to drop by what dropping them does: every candidate is run as the A model would"
        " be, beginnings that candidates share once, and ranked by KL(dense || A). Then choose B by KL(dense || AB).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, metavar="MODEL", help="the dense model: a directory or a Hub id")
    p.add_argument("--output_dir", required=True, metavar="DIR", help="where choice.csv, .json and .svg go")
    p.add_argument("--overwrite", action="store_true",
        help="replace what is there even if it is no such choice; never an input")  # fmt: skip
    what = p.add_argument_group("candidates")
    what.add_argument("--drop", type=positive, required=True, metavar="N", help="layers to drop")
    what.add_argument("--keep_last_layer", action="store_true", help="never drop the last layer (default: it may go)")
    what.add_argument("--method", choices=METHODS, default="blocks",
        help="every block of consecutive layers, or single ones in turn (default: %(default)s)")  # fmt: skip
    what.add_argument("--race", type=positive, metavar="N",
        help="every N windows, drop candidates that are surely worse than the best (default: measure all)")  # fmt: skip
    what.add_argument("--splits", choices=SPLITS, default="contiguous",
        help="B at either end of the dropped layers, every choice of B, or the lower half unmeasured (default:"
        " %(default)s)")  # fmt: skip
    what.add_argument("--b_sizes", type=positive, nargs="+", default=[], metavar="N",
        help="layers of B: one size to choose from, and others to tell beside it (default: half of them)")  # fmt: skip
    text = p.add_argument_group("text")
    text.add_argument("--dataset", default="wikitext2",
        help="wikitext2, c4, ptb, pydoc or a path, of its training split (default: %(default)s)")  # fmt: skip
    text.add_argument("--mirror", metavar="DIR", help="a local copy of the dataset (default: the Hub)")
    text.add_argument("--text_file", action="append", default=[], metavar="FILE", help="measure on text files instead")
    text.add_argument("--nsamples", type=positive, default=32, metavar="N", help="windows (default: %(default)s)")
    text.add_argument("--seqlen", type=positive, default=2048, metavar="N",
        help="tokens in a window (default: %(default)s)")  # fmt: skip
    text.add_argument("--seed", type=seed, default=0, metavar="N",
        help="0 takes the first windows, others draw them (default: 0)")  # fmt: skip
    run = p.add_argument_group("machine")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda:N (default: %(default)s)")
    run.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16",
        help="of weights and hidden states (default: %(default)s)")  # fmt: skip
    run.add_argument("--batch_size", type=positive, default=1, metavar="N",
        help="windows at once (default: %(default)s)")  # fmt: skip
    run.add_argument("--max_memory", type=size_in_bytes, metavar="SIZE",
        help="for weights and hidden states, such as 6GB (default: a share of what is free)")  # fmt: skip
    return p


@reports_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parser().parse_args(argv)
    with quick_imports():
        from mistral_prune_lora.checkpoints.families import read_config
        from mistral_prune_lora.checkpoints.model_place import model_directory
        from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
        from mistral_prune_lora.choosing.written import RECORD, ChoiceJob
        from mistral_prune_lora.storage.outputs import Output, claim
        from mistral_prune_lora.storage.transaction import check_place
        from mistral_prune_lora.streaming.compute import Compute
        from mistral_prune_lora.text.sources import load_text
        from mistral_prune_lora.text.windows import make_windows

    settings = ChoiceSettings(
        given.drop, given.keep_last_layer, given.method, given.race, given.splits, tuple(given.b_sizes)
    )
    read = [given.model, given.dataset, given.mirror, *given.text_file]
    claim([Output.directory(given.output_dir, "--output_dir", RECORD)], read, overwrite=given.overwrite)
    check_place(given.output_dir)
    compute = Compute.named(given.device, given.dtype, given.batch_size, given.max_memory)
    model = model_directory(given.model)
    settings.check(read_config(model)["num_hidden_layers"])  # refused before a text is fetched
    text = load_text(given.dataset, split="train", mirror=given.mirror, text_files=given.text_file)
    windows = make_windows(
        text, load_tokenizer(model), seqlen=given.seqlen, max_windows=given.nsamples, seed=given.seed
    )
    choice = ChoiceJob(model, windows, settings, compute, Path(given.output_dir)).run(overwrite=given.overwrite)
    print(summary(choice))
    print(f"\n{RECORD.name}, and the table of all candidates: {given.output_dir}")


def summary(choice: Choice) -> str:
    """The best candidates of each kind, what proxies would have chosen, and the choice."""
    lines = []
    for kind, rows in choice.table.groupby("kind", sort=False):
        lines += ["", f"{kind}: {len(rows)} candidates, the best of them"]
        for row in rows[:_SHOWN].to_dict("records"):
            layers = f"B {_spans(row['B'])}, C {_spans(row['C'])}" if row["B"] else _spans(row["dropped"])
            error = "" if row["windows"] < 2 else f" ± {row['kl_dense_se']:.4f}"
            told = f"KL {row['kl_dense']:.4f}{error}  PPL {row['ppl']:.2f}  windows {row['windows']}"
            lines.append(f"  {layers:<24} {told}")
    for name, found in choice.proxies.items():
        rho = "" if found["spearman"] is None else f", Spearman {found['spearman']:.2f}"
        lines.append(f"by {name}: {spans(found['picks'])}, KL {found['regret']:.4f} above the best{rho}")
    lines += ["", f"to drop: {spans(choice.dropped)}; B {spans(choice.b) or 'none'}, C {spans(choice.c)}"]
    return "\n".join(lines).lstrip("\n")


def _spans(words: str) -> str:
    return spans(map(int, words.split()))


if __name__ == "__main__":
    sys.exit(main())
