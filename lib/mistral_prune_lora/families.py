"""Which model families are taken: one list, asked by every command and by the configuration check. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.errors import CheckpointError

# Their embedding goes into the first layer and their last layer into norm and head without further scaling.
FAMILIES = ("mistral", "llama")


def check_family(config: Mapping, where: str | Path) -> None:
    """Raise a CheckpointError if a model's parsed config.json is of a family that is not taken.

    Args:
        config: the content of config.json.
        where: the model's directory, for the error.
    """
    if config.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"model_type {config.get('model_type')!r} is not one that is supported",
            where=where,
            mend=f"Use a model of one of {', '.join(FAMILIES)}",
        )
