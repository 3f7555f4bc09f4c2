"""The command that writes one stage of a pruned model as a checkpoint for other software."""

from __future__ import annotations

import argparse
import sys

from mistral_prune_lora.argument_types import shard_size
from mistral_prune_lora.errors import reports_errors
from mistral_prune_lora.quick_imports import quick_imports

EXAMPLES = """examples:
  everything restored, as one model that transformers, llama.cpp and others load:
    python -m mistral_prune_lora.export_stage --model_path ./merged/A_merged \\
      --b_bundle ./merged/B_merged --c_bundle ./merged/C_merged --stage FULL --output_dir ./exported/FULL
  A alone, with its layers numbered without gaps:
    python -m mistral_prune_lora.export_stage --model_path ./merged/A_merged --stage A --output_dir ./exported/A
  A, and a file each for B and C, for a server that loads them one after another:
    python -m mistral_prune_lora.export_stage --model_path ./merged/A_merged \\
      --b_bundle ./merged/B_merged --c_bundle ./merged/C_merged --stage FULL --format stage_files \\
      --output_dir ./exported/staged
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.export_stage",
        description="Write one stage of a pruned or merged model as a checkpoint that stock software loads. A dense"
        " model, which has no manifest.json, can be exported as FULL.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model_path", required=True, metavar="DIR", help="the A model, merged or not")
    p.add_argument("--b_bundle", metavar="DIR", help="the B bundle (default: none)")
    p.add_argument("--c_bundle", metavar="DIR", help="the C bundle (default: none)")
    p.add_argument(
        "--bundles_dir", metavar="DIR", help="a directory with the bundles B and C in it, as pruning writes it"
    )
    p.add_argument("--stage", required=True, choices=("A", "AB", "FULL"), help="which layers")
    p.add_argument("--output_dir", required=True, metavar="DIR", help="the result; a former export is replaced whole")
    p.add_argument(
        "--format",
        default="stock",
        choices=("stock", "stage_files"),
        help="stock: one dense model, its layers numbered 0, 1, 2 ...; stage_files: A under its original layer indices,"
        " and B and C, as far as the stage has them, in a file each (default: %(default)s)",
    )
    p.add_argument(
        "--max_shard_size", type=shard_size, metavar="SIZE", help="e.g. 5GB; split the model (default: one file)"
    )
    p.add_argument("--tokenizer_path", metavar="DIR", help="take the tokenizer from here (default: found by itself)")
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is at --output_dir even if no export has written it; never an input (default: refuse)",
    )
    return p


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parser().parse_args(argv)
    # After parsing: --help need not wait for torch.
    with quick_imports():
        from mistral_prune_lora.evaluation.inputs import sort_inputs
        from mistral_prune_lora.exporting.export import export_stage

    inputs = sort_inputs(
        [given.model_path], b_bundle=given.b_bundle, c_bundle=given.c_bundle, bundles_dir=given.bundles_dir
    )
    export_stage(
        inputs.models[0][1],
        given.output_dir,
        stage=given.stage,
        bundles=inputs.bundles,
        form=given.format,
        max_shard_size=given.max_shard_size,
        tokenizer_path=given.tokenizer_path,
        overwrite=given.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
