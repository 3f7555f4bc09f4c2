"""Perplexity of merged models: `python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mistral_prune_lora.argument_types import LeftOut, positive, seed, size_in_bytes
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.quick_imports import quick_imports

_EPILOG = """\
examples:
  # one merged model: stage A
  python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel --model_path ./merged/A_merged

  # A, AB and FULL; bundles are told from models, and B from C
  python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel \\
    --model_path ./merged/A_merged ./merged/B_merged ./merged/C_merged

  # beside the dense model, which also gives KL divergence and top-1 agreement
  python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel \\
    --model_path mistralai/Mistral-7B-v0.1 ./merged/A_merged --tokenizer_path mistralai/Mistral-7B-v0.1

  # no network: a local copy of the dataset, or your own text
  python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel --model_path ./merged/A_merged --mirror /data/wikitext
  python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel --model_path ./merged/A_merged --text_file a.txt

  # 7B in float32 on a machine with 8 GB; killed and started again, it goes on where it stopped
  python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel --model_path ./merged/A_merged \\
    --device cpu --dtype fp32 --max_memory 5GB
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.mistral_eval_ppl_mergedmodel",
        description="Measure the perplexity of merged (or pruned, or dense) models at the stages A, AB and FULL. "
        "Layers are streamed from disk, and layers that several stages share are computed once.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what to evaluate")
    what.add_argument("--model_path", nargs="+", required=True, metavar="PATH",
        help="models (directories with config.json, or Hub ids) and bundles (directories of layer_XXX.safetensors), in "
        "any order. A bundle is B or C by the layers that the model's manifest.json gives to each, else by b_merged or "
        "c_merged in its name")  # fmt: skip
    what.add_argument("--b_bundle", metavar="DIR", help="the B bundle, named outright (default: none)")
    what.add_argument("--c_bundle", metavar="DIR", help="the C bundle, named outright (default: none)")
    what.add_argument("--bundles_dir", metavar="DIR",
        help="a directory with the bundles B and C in it, as pruning writes it (default: none)")  # fmt: skip
    what.add_argument("--stages", metavar="LIST",
        help="comma-separated, of A, AB, FULL (default: A,AB,FULL with bundles, else A). With a B bundle only: A,AB. A "
        "dense model has a single stage")  # fmt: skip
    what.add_argument("--lora_paths", nargs="+", default=[], metavar="DIR",
        help="LoRA adapters: each model is evaluated a second time with them left unmerged, every adapter on the "
        "layers of its part only (default: none)")  # fmt: skip
    what.add_argument("--adapter_indices", choices=("original", "compact"), default="original",
        help="how the adapters of --lora_paths for A count layers: by the dense model's indices, or from 0 over the "
        "layers that A keeps (default: %(default)s)")  # fmt: skip
    what.add_argument("--tokenizer_path", metavar="PATH",
        help="tokenizer directory or Hub id (default: the first that is found in the model, its original_config, its "
        "adapter's or its manifest's base model)")  # fmt: skip
    text = p.add_argument_group("on which text")
    text.add_argument("--dataset", default="wikitext2",
        help="wikitext2, c4, ptb, pydoc (built in), or the path of a parquet, json, jsonl, csv or txt file "
        "(default: %(default)s)")  # fmt: skip
    text.add_argument("--split", default="test", help="split of the dataset (default: %(default)s)")
    text.add_argument("--column", default="text", help="column of your own dataset (default: %(default)s)")
    text.add_argument("--mirror", metavar="PATH", help="a local copy of the dataset's repository (default: the Hub)")
    text.add_argument("--text_file", action="append", default=[], metavar="FILE",
        help="a UTF-8 text file instead of a dataset; may be given several times (default: none)")  # fmt: skip
    text.add_argument("--seqlen", type=positive, default=2048, help="token ids in a window (default: %(default)s)")
    text.add_argument("--nsamples", type=positive, default=LeftOut(256),
        help="windows at most; WikiText-2 has 163 with Mistral's tokenizer. What this cuts off is said "
        "(default: %(default)s)")  # fmt: skip
    text.add_argument("--seed", type=seed, default=0,
        help="which windows are taken where there are more than --nsamples: 0 takes the first ones, as published "
        "numbers do; any other seeds a random choice (default: %(default)s)")  # fmt: skip
    text.add_argument("--max_batches", type=positive, metavar="N", help="stop after N batches (default: all)")
    how = p.add_argument_group("how")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda:0 ... (default: auto = cuda:0 if there is one)")
    how.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16",
        help="of weights and activations; the loss is always float32 (default: %(default)s)")  # fmt: skip
    how.add_argument("--batch_size", type=positive, default=1, help="windows at once (default: %(default)s)")
    how.add_argument("--max_memory", type=size_in_bytes, metavar="SIZE",
        help="memory for weights and activations on the device, e.g. 5GB (default: a quarter of "
        "what is free, half on a GPU)")  # fmt: skip
    how.add_argument("--work_dir", metavar="DIR",
        help="keep boundary activations and finished scores here, so that a later evaluation with another bundle runs "
        "only what depends on it (default: in the user's cache, deleted when everything is done)")  # fmt: skip
    out = p.add_argument_group("output, besides the table")
    out.add_argument("--json", metavar="FILE", help="all results with their identity and paired differences")
    out.add_argument("--csv", metavar="FILE", help="a row a result")
    out.add_argument("--overwrite", action="store_true",
        help="replace a file that no evaluation has written, too; never an input (default: it is refused)")  # fmt: skip
    return p


@reports_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    args = parser().parse_args(argv)
    # After parsing: --help need not wait for torch.
    with quick_imports():
        from mistral_prune_lora.evaluation.command import run

    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    sys.exit(main())
