"""The command that cuts a dense model into A and the bundles B and C."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mistral_prune_lora.argument_types import positive
from mistral_prune_lora.errors import LayoutError, reports_errors
from mistral_prune_lora.layout import Layout, layout_from_manifest, read_manifest
from mistral_prune_lora.transaction import atomic_file, check_place

EXAMPLES = """examples:
  drop a quarter of Mistral-7B's layers, those that change their input least:
    python -m mistral_prune_lora.pruning.layeronly_drop --model mistralai/Mistral-7B-v0.1 \\
      --drop_frac 0.25 --keep_last_layer \\
      --save_dir ./25_mistral_results/pruning/A --save_removed_dir ./25_mistral_results/pruning/bundles
  drop layers of your own choice, without a search:
    python -m mistral_prune_lora.pruning.layeronly_drop --model ./Mistral-7B-v0.1 \\
      --b_layers 21 22 23 24 --c_layers 25 26 27 28 \\
      --save_dir ./25_mistral_results/pruning/A --save_removed_dir ./25_mistral_results/pruning/bundles
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.pruning.layeronly_drop",
        description="Drop a block of consecutive layers: the one with the smallest angular distance between what enters"
        " and what leaves it. Writes A without those layers, and the bundles B (lower half) and C that hold them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, metavar="MODEL", help="the dense model: a directory or a Hub id")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda:N, for the search (default: %(default)s)")
    p.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="for the search (default: bf16)")
    p.add_argument(
        "--drop_frac", type=float, default=0.25, help="share of the layers to drop, rounded (default: %(default)s)"
    )
    p.add_argument("--keep_last_layer", action="store_true", help="never drop the last layer (default: it may go)")
    p.add_argument("--dataset", default="wikitext2", help="calibration text: wikitext2, c4, ptb, pydoc or a path")
    p.add_argument("--mirror", metavar="DIR", help="a local copy of the dataset (default: the Hub)")
    p.add_argument("--text_file", action="append", default=[], metavar="FILE", help="calibrate on text files instead")
    p.add_argument("--nsamples", type=positive, default=128, help="calibration windows (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="draws the windows (default: %(default)s)")
    p.add_argument("--seqlen", type=positive, default=2048, help="tokens in a window (default: %(default)s)")
    p.add_argument("--max_batches", type=positive, help="look at so many windows at most (default: all)")
    p.add_argument("--save_dir", required=True, metavar="DIR", help="where A goes")
    p.add_argument("--save_removed_dir", required=True, metavar="DIR", help="where B/ and C/ go")
    p.add_argument("--split_policy", default="half", choices=("half", "ratio"), help="B and C (default: %(default)s)")
    p.add_argument("--split_ratio", type=float, default=0.5, help="B's share with 'ratio' (default: %(default)s)")
    p.add_argument("--prune_log", metavar="FILE", help="also write the search's record here (always in A's directory)")
    p.add_argument("--overwrite", action="store_true", help="replace what no pruning has written, too; never an input")
    p.add_argument("--b_layers", type=int, nargs="+", metavar="N", help="fix B's layers; no search")
    p.add_argument("--c_layers", type=int, nargs="+", metavar="N", help="fix C's layers; no search")
    return p


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parser().parse_args(argv)
    from mistral_prune_lora.model_place import model_directory
    from mistral_prune_lora.prune import FIXED_LAYERS, prune_model

    keep_log = _claim(given)
    named, given.model = given.model, model_directory(given.model)
    if given.b_layers or given.c_layers:
        from mistral_prune_lora.checkpoint import read_config

        count = read_config(given.model)["num_hidden_layers"]
        layout = Layout(count, tuple(given.b_layers or ()), tuple(given.c_layers or ()))
        selection, log = FIXED_LAYERS, {}
    else:
        layout, selection, log = _search(given)
    prune_model(
        given.model,
        layout,
        save_dir=given.save_dir,
        save_removed_dir=given.save_removed_dir,
        selection=selection,
        log=log,
        base_model=None if os.path.exists(named) else named,
        overwrite=given.overwrite,
    )
    if keep_log:
        with atomic_file(given.prune_log, check=keep_log) as fresh:
            fresh.write_bytes((Path(given.save_dir) / "prune_log.json").read_bytes())
    written = layout_from_manifest(read_manifest(given.save_dir))
    print(f"A keeps {len(written.kept)} of {written.num_layers} layers: {os.path.abspath(given.save_dir)}")
    print(f"B holds {list(written.b)}, C holds {list(written.c)}: {os.path.abspath(given.save_removed_dir)}")


def _claim(given: argparse.Namespace) -> Callable[[], None] | None:
    """Raise a PipelineError unless everything may and can be written; returns the check for --prune_log, if any."""
    from mistral_prune_lora.outputs import claim
    from mistral_prune_lora.prune import prune_log_output, prune_outputs

    read = [given.model, *given.text_file, given.dataset, given.mirror]
    parts = prune_outputs(given.save_dir, given.save_removed_dir)
    # A's own record of the search needs no copy.
    inside = given.prune_log and os.path.abspath(given.prune_log) == os.path.abspath(f"{given.save_dir}/prune_log.json")
    logs = [prune_log_output(given.prune_log)] if given.prune_log and not inside else []
    claim([*parts, *logs], read, overwrite=given.overwrite)
    check_place(*(part.path for part in parts))
    check_place(*(log.path for log in logs), directory=False)
    return claim(logs, read, overwrite=given.overwrite) if logs else None


def _search(given: argparse.Namespace) -> tuple[Layout, dict, dict]:
    from mistral_prune_lora.checkpoint import read_config
    from mistral_prune_lora.device import resolve_device
    from mistral_prune_lora.importance import angular_distances, last_token_states
    from mistral_prune_lora.model import DTYPES
    from mistral_prune_lora.prune import split_block
    from mistral_prune_lora.pruning.data import get_loaders
    from mistral_prune_lora.tokenizer import load_tokenizer

    count = read_config(given.model)["num_hidden_layers"]
    size = round(count * given.drop_frac)
    if not 0 < size < count:
        raise LayoutError(
            f"{given.drop_frac} of {count} layers are {size} layers",
            where="--drop_frac",
            mend="choose a share that drops at least one layer and keeps at least one",
        )
    resolve_device(given.device)  # before the text is fetched
    loader, _ = get_loaders(
        given.dataset,
        nsamples=given.nsamples,
        seed=given.seed,
        seqlen=given.seqlen,
        tokenizer=load_tokenizer(given.model),
        mirror=given.mirror,
        text_files=given.text_file,
        splits=("train",),
    )
    states = last_token_states(
        given.model,
        [ids for ids, _ in loader],
        dtype=DTYPES[given.dtype],
        device=given.device,
        max_batches=given.max_batches,
    )
    table = angular_distances(states, size, keep_last_layer=given.keep_last_layer)
    best = table[table.recommended].iloc[0]
    b, c = split_block(int(best.start), size, policy=given.split_policy, ratio=given.split_ratio)
    selection = {
        "method": "angular_distance",
        "block": {"start": int(best.start), "n": size},
        "angular_distance": float(best.angular_distance),
        "keep_last_layer": given.keep_last_layer,
    }
    keys = ("dataset", "text_file", "nsamples", "seed", "seqlen", "max_batches", "dtype", "split_policy", "split_ratio")
    blocks = json.loads(table[["start", "end", "angular_distance", "rank"]].to_json(orient="records"))
    return Layout(count, b, c), selection, {"settings": {key: getattr(given, key) for key in keys}, "blocks": blocks}


if __name__ == "__main__":
    sys.exit(main())
