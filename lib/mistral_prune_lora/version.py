"""Which version of this package runs, and where it lies. Imports nothing."""

from __future__ import annotations

from pathlib import Path

# pyproject.toml reads it from here, so that what is said is the version of the code that runs, installed or not.
VERSION = "0.1.0"


def package_line() -> str:
    """The package's name, version and directory: mistral-prune-lora 0.1.0 (/path/to/mistral_prune_lora)."""
    return f"mistral-prune-lora {VERSION} ({Path(__file__).resolve().parent})"
