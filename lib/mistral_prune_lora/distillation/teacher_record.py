"""What the teacher's stored hidden states belong to: these token ids, this dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.text.windows import Windows


def weight_digests(path: str | Path) -> dict[str, str]:
    """The sha256 of each weight file of a model or bundle, by name."""
    return {file.name: file_sha256(file) for file in open_checkpoint(path).files}


def teacher_record(windows: Windows, digests: Mapping[str, str]) -> dict:
    """The record that is kept with the states.

    Args:
        windows: the training windows.
        digests: of the dense model, as `weight_digests` gives them.
    """
    return {"ids_sha256": windows.identity.ids_sha256, "teacher": dict(digests)}


def open_teacher_states(path: str | Path, windows: Windows, digests: Mapping[str, str]) -> ActivationReader:
    """Open stored states, of the same windows and teacher.

    Raises:
        DataError: they belong to other windows or another teacher.
        CheckpointError: it is no file of activations.
    """
    reader, wanted = ActivationReader(path), teacher_record(windows, digests)
    for key, words in (("ids_sha256", "other windows"), ("teacher", "another teacher")):
        if reader.run.get(key) != wanted[key]:
            raise DataError(f"the teacher's states belong to {words}", where=path, mend="make them again")
    return reader
