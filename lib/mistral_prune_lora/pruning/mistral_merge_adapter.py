"""The command that merges LoRA adapters into an A model or into a bundle."""

from __future__ import annotations

import argparse
import sys

from mistral_prune_lora.argument_types import shard_size
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.quick_imports import quick_imports

EXAMPLES = """examples:
  A (a full model comes out):
    python -m mistral_prune_lora.pruning.mistral_merge_adapter \\
      --base_model ./25_mistral_results/pruning/A \\
      --adapter_path ./mistral_kd_lora_results/adapters/A_lora/stageA/stageA \\
      --output_dir ./merged_models_mistral_7b/A_merged --device cuda:0
  B (its layer files come out, since the base is a bundle):
    python -m mistral_prune_lora.pruning.mistral_merge_adapter \\
      --base_model ./25_mistral_results/pruning/bundles/B \\
      --adapter_path ./mistral_kd_lora_results/adapters/B_lora/stageB \\
      --output_dir ./merged_models_mistral_7b/B_merged --device cuda:0
  B such that restoring it also undoes A's merge (and C, without an adapter, B's; FULL is the dense model then):
    ... --undo_of ./25_mistral_results/pruning/A ./merged_models_mistral_7b/A_merged
    python -m mistral_prune_lora.pruning.mistral_merge_adapter \\
      --base_model ./25_mistral_results/pruning/bundles/C \\
      --undo_of ./25_mistral_results/pruning/bundles/B ./merged_models_mistral_7b/B_merged \\
      --output_dir ./merged_models_mistral_7b/C_merged
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.pruning.mistral_merge_adapter",
        description="Merge LoRA adapters into a model or a bundle, with the bits of PEFT's merge_and_unload. A base"
        " with config.json is a model and gives a full model; a base with layer_XXX.safetensors is a bundle and gives a"
        " bundle.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--base_model", required=True, metavar="DIR", help="the A model, or the B or C bundle")
    chosen = p.add_mutually_exclusive_group()
    chosen.add_argument("--adapter_path", metavar="DIR", help="the adapter")
    chosen.add_argument("--adapter_paths", nargs="+", metavar="DIR", help="several adapters, merged in this order")
    p.add_argument(
        "--undo_of",
        nargs=2,
        metavar=("ORIGINAL", "MERGED"),
        help="with a bundle: write beside its layers what the merge of another part has changed there, so that"
        " restoring the bundle puts it back: A before and after its merge, for bundle B; B before and after its merge,"
        " for bundle C. A bundle needs no adapter then",
    )
    p.add_argument("--output_dir", required=True, metavar="DIR", help="the result; a former merge is replaced whole")
    p.add_argument(
        "--device", default="auto", help="auto, cpu or cuda:N (default: auto, the first GPU if there is one)"
    )
    p.add_argument("--tokenizer_path", metavar="DIR", help="take the tokenizer from here (default: found by itself)")
    p.add_argument("--no_verify", action="store_true", help="leave out the check of the result")
    p.add_argument("--save_bundle_only", action="store_true", help="write layer files even if the base is a model")
    p.add_argument("--save_full_model", action="store_true", help="write a full model even if the base is a bundle")
    p.add_argument(
        "--skeleton",
        metavar="DIR",
        help="the A model a bundle belongs to (default: what the adapter names as its base)",
    )
    p.add_argument(
        "--adapter_indices",
        default="original",
        choices=("original", "compact"),
        help="how the adapters count layers: by the dense model's indices, or from 0 over the layers that A keeps"
        " (default: %(default)s)",
    )
    p.add_argument(
        "--max_shard_size", type=shard_size, metavar="SIZE", help="e.g. 5GB; split a full model (default: one file)"
    )
    p.add_argument(
        "--output_dtype",
        choices=("bf16", "fp16", "fp32"),
        help="cast the base to this first, and merge and save in it, as PEFT does with a model that was loaded in it"
        " (default: what each tensor of the base is stored as)",
    )
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is there even if it is no merge; never an input",
    )
    return p


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parser().parse_args(argv)
    if not (given.adapter_path or given.adapter_paths or given.undo_of):
        parser().error("one of the arguments --adapter_path --adapter_paths --undo_of is required")
    with quick_imports():
        from mistral_prune_lora.merging.merge import merge_adapters
        from mistral_prune_lora.merging.plan import MergeSettings

    merge_adapters(
        given.base_model,
        given.adapter_paths or ([given.adapter_path] if given.adapter_path else []),
        given.output_dir,
        settings=MergeSettings(
            skeleton=given.skeleton,
            save_bundle_only=given.save_bundle_only,
            save_full_model=given.save_full_model,
            max_shard_size=given.max_shard_size,
            adapter_indices=given.adapter_indices,
            output_dtype=given.output_dtype,
            undo_of=tuple(given.undo_of) if given.undo_of else None,
        ),
        device=given.device,
        tokenizer_path=given.tokenizer_path,
        verify=not given.no_verify,
        overwrite=given.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
