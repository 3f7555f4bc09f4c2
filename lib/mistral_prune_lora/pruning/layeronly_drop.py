"""The command that cuts a dense model into A and the bundles B and C."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mistral_prune_lora.argument_types import positive, seed, share, size_in_bytes
from mistral_prune_lora.checkpoints.manifest import PRUNE_LOG, read_layout
from mistral_prune_lora.errors import LayoutError, PipelineError, reports_errors
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage.transaction import atomic_file, check_place

# What the scripts that this pipeline grew out of search with: their defaults, and their candidates.
PRESETS = {
    "original": {
        "dataset": "c4",
        "nsamples": 64,
        "seqlen": 1024,
        "dtype": "fp16",
        "drop_frac": 0.30,
        "candidates": "original",
    }
}
EXAMPLES = """examples:
  drop a quarter of Mistral-7B's layers, those that change their input least:
    python -m mistral_prune_lora.pruning.layeronly_drop --model mistralai/Mistral-7B-v0.1 \\
      --drop_frac 0.25 --keep_last_layer \\
      --save_dir ./25_mistral_results/pruning/A --save_removed_dir ./25_mistral_results/pruning/bundles
  search as the original scripts do (C4, 64 windows of 1024 tokens, fp16), with your own share of layers:
    python -m mistral_prune_lora.pruning.layeronly_drop --preset original --model mistralai/Mistral-7B-v0.1 \\
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
        " and what leaves it. Writes A without those layers, and the bundles B (the lower half, the smaller one of an"
        " odd block) and C that hold them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, metavar="MODEL", help="the dense model: a directory or a Hub id")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda:N, for the search (default: %(default)s)")
    p.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="for the search (default: bf16)")
    p.add_argument(
        "--drop_frac", type=share, default=0.25, help="share of the layers to drop, rounded (default: %(default)s)"
    )
    p.add_argument("--keep_last_layer", action="store_true", help="never drop the last layer (default: it may go)")
    p.add_argument(
        "--candidates",
        default="all",
        choices=("all", "original"),
        help="blocks to choose from: all of them, or all but the last, as the original scripts do (default: all)",
    )
    p.add_argument("--dataset", default="wikitext2", help="calibration text: wikitext2, c4, ptb, pydoc or a path")
    p.add_argument("--mirror", metavar="DIR", help="a local copy of the dataset (default: the Hub)")
    p.add_argument("--text_file", action="append", default=[], metavar="FILE", help="calibrate on text files instead")
    p.add_argument("--nsamples", type=positive, default=128, help="calibration windows (default: %(default)s)")
    p.add_argument("--seed", type=seed, default=0, help="draws the windows (default: %(default)s)")
    p.add_argument("--seqlen", type=positive, default=2048, help="tokens in a window (default: %(default)s)")
    p.add_argument("--batch_size", type=positive, default=1, help="windows at once (default: %(default)s)")
    p.add_argument(
        "--max_memory",
        type=size_in_bytes,
        metavar="SIZE",
        help="e.g. 8GB, for the search (default: a share of what is free)",
    )
    p.add_argument("--max_batches", type=positive, help="look at so many windows at most (default: all)")
    p.add_argument("--save_dir", required=True, metavar="DIR", help="where A goes")
    p.add_argument("--save_removed_dir", required=True, metavar="DIR", help="where B/ and C/ go")
    p.add_argument("--split_policy", default="half", choices=("half", "ratio"), help="B and C (default: %(default)s)")
    p.add_argument("--split_ratio", type=share, default=0.5, help="B's share with 'ratio' (default: %(default)s)")
    p.add_argument(
        "--prune_log",
        metavar="FILE",
        default=PRUNE_LOG,
        help="the search's record; a relative name is meant inside --save_dir, where prune_log.json is always written",
    )
    p.add_argument(
        "--preset",
        choices=PRESETS,
        help="defaults of the original scripts: "
        + " ".join(f"--{key} {value}" for key, value in PRESETS["original"].items())
        + "; flags that are given go before them",
    )
    p.add_argument("--overwrite", action="store_true", help="replace what no pruning has written, too; never an input")
    p.add_argument("--b_layers", type=int, nargs="+", metavar="N", help="fix B's layers; no search")
    p.add_argument("--c_layers", type=int, nargs="+", metavar="N", help="fix C's layers; no search")
    return p


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parse(argv)
    log_name, log_file = _log_places(given)
    from mistral_prune_lora.checkpoints.model_place import model_directory
    from mistral_prune_lora.pruning.cut import FIXED_LAYERS, prune_model

    keep_log = _claim(given, log_file)
    named, given.model = given.model, model_directory(given.model)
    if given.b_layers or given.c_layers:
        from mistral_prune_lora.checkpoints.families import read_config

        count = read_config(given.model)["num_hidden_layers"]
        layout = Layout(count, tuple(given.b_layers or ()), tuple(given.c_layers or ()))
        selection: Mapping = FIXED_LAYERS
        log: Mapping = {}
    else:
        layout, selection, log = _search(given)
    prune_model(
        given.model,
        layout,
        save_dir=given.save_dir,
        save_removed_dir=given.save_removed_dir,
        selection=selection,
        log=log,
        log_name=log_name,
        base_model=None if os.path.exists(named) else named,
        overwrite=given.overwrite,
    )
    if log_file:
        with atomic_file(log_file, check=keep_log) as fresh:
            fresh.write_bytes((Path(given.save_dir) / PRUNE_LOG).read_bytes())
    written = read_layout(given.save_dir) or layout
    print(f"A keeps {len(written.kept)} of {written.num_layers} layers: {os.path.abspath(given.save_dir)}")
    print(f"B holds {list(written.b)}, C holds {list(written.c)}: {os.path.abspath(given.save_removed_dir)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments; flags that are not given have the preset's values, if one is named, or else ours."""
    p = parser()
    preset = p.parse_args(argv).preset
    p.set_defaults(**PRESETS.get(preset, {}))
    return p.parse_args(argv)


def _log_places(given: argparse.Namespace) -> tuple[str, Path | None]:
    """(the name of the search's record in A's directory, a place outside of it where it is written as well)."""
    file = Path(given.prune_log)
    if file.is_absolute() and os.path.realpath(file.parent) != os.path.realpath(given.save_dir):
        return PRUNE_LOG, file
    if file.name in ("", "..") or (not file.is_absolute() and file.name != given.prune_log):
        raise PipelineError(
            f"{given.prune_log} is not a file name",
            where="--prune_log",
            mend="give a name, which is meant inside --save_dir, or an absolute path",
        )
    from mistral_prune_lora.pruning.cut import FILES_OF_A

    if file.name != PRUNE_LOG and file.name in FILES_OF_A:
        raise PipelineError(
            f"{file.name} is the name of another file of an A model", where="--prune_log", mend="choose another name"
        )
    return file.name, None


def _claim(given: argparse.Namespace, log_file: Path | None) -> Callable[[], None]:
    """Raise a PipelineError unless everything may and can be written; returns the check for the log outside of A."""
    from mistral_prune_lora.pruning.cut import prune_log_output, prune_outputs
    from mistral_prune_lora.storage.outputs import claim

    read = [given.model, *given.text_file, given.dataset, given.mirror]
    parts = prune_outputs(given.save_dir, given.save_removed_dir)
    logs = [prune_log_output(log_file)] if log_file else []
    claim([*parts, *logs], read, overwrite=given.overwrite)
    check_place(*(part.path for part in parts))
    check_place(*(log.path for log in logs), directory=False)
    return claim(logs, read, overwrite=given.overwrite)


def _search(given: argparse.Namespace) -> tuple[Layout, dict, dict]:
    import torch

    from mistral_prune_lora.checkpoints.families import read_config
    from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
    from mistral_prune_lora.pruning.cut import split_block
    from mistral_prune_lora.pruning.data import get_loaders
    from mistral_prune_lora.pruning.importance import angular_distances, last_token_states
    from mistral_prune_lora.streaming.compute import Compute

    count = read_config(given.model)["num_hidden_layers"]
    size = round(count * given.drop_frac)
    if not 0 < size < count:
        raise LayoutError(
            f"{given.drop_frac} of {count} layers are {size} layers",
            where="--drop_frac",
            mend="choose a share that drops at least one layer and keeps at least one",
        )
    compute = Compute.named(given.device, given.dtype, given.batch_size, given.max_memory)  # before the text is fetched
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
        torch.cat([ids for ids, _ in (loader or [])[: given.max_batches]]),
        beside=given.save_dir,
        compute=compute,
    )
    table = angular_distances(states, size, keep_last_layer=given.keep_last_layer, all_blocks=given.candidates == "all")
    best = table[table.recommended].iloc[0]
    b, c = split_block(int(best.start), size, policy=given.split_policy, ratio=given.split_ratio)
    selection = {
        "method": "angular_distance",
        "block": {"start": int(best.start), "n": size},
        "angular_distance": float(best.angular_distance),
        "keep_last_layer": given.keep_last_layer,
    }
    log = {
        **{key: getattr(given, key) for key in ("seed", "seqlen", "drop_frac", "keep_last_layer")},
        "split": {"policy": given.split_policy, "ratio": given.split_ratio},
        "settings": {
            key: getattr(given, key)
            for key in ("preset", "dataset", "text_file", "nsamples", "max_batches", "dtype", "candidates")
        },
        "blocks": json.loads(table[["start", "end", "angular_distance", "rank"]].to_json(orient="records")),
    }
    return Layout(count, b, c), selection, log


if __name__ == "__main__":
    sys.exit(main())
