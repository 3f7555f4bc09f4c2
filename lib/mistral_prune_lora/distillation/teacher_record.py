"""What the teacher's stored hidden states belong to: these token ids, this dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.manifest import read_layout
from mistral_prune_lora.checkpoints.undo import read_undo
from mistral_prune_lora.errors import CheckpointError, DataError
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.digests import file_digest
from mistral_prune_lora.storage.dtypes import torch_name
from mistral_prune_lora.streaming.record import config_sha256
from mistral_prune_lora.text.windows import Windows

_AGAIN = "make them again"


def weight_digests(path: str | Path) -> dict[str, str]:
    """The sha256 of each weight file of a model or bundle, by name.

    Raises:
        CheckpointError: one is not what the record of whoever wrote it says.
    """
    checkpoint = open_checkpoint(path)
    undo = read_undo(checkpoint)
    files = [*checkpoint.files, *({entry.file for entry in undo.entries.values()} if undo else ())]
    checkpoint.check_files(files)
    return {file.name: file_digest(file) for file in files}


def teacher_record(windows: Windows, teacher_dir: str | Path) -> dict:
    """The record that is kept with the states: ids_sha256, shape, teacher (its weights' digests), config_sha256.

    Args:
        windows: the training windows.
        teacher_dir: the dense model.
    """
    return {
        "ids_sha256": windows.identity.ids_sha256,
        # The digest is of ids in reading order: windows of half the length, twice as many, have the same.
        "shape": list(windows.ids.shape),
        "teacher": weight_digests(teacher_dir),
        "config_sha256": config_sha256(open_checkpoint(teacher_dir)),
    }


def open_teacher_states(
    path: str | Path, wanted: Mapping, dtype: torch.dtype, layer: int | None = None
) -> ActivationReader:
    """Open stored states.

    Args:
        path: the file.
        wanted: what they must be of, as `teacher_record` gives it.
        dtype: that the teacher's head computes in.
        layer: which layer they leave; None for the final ones, after the norm.

    Raises:
        DataError: they belong to other windows, another teacher or layer, or are of another dtype.
        CheckpointError: it is no file of activations.
    """
    reader = ActivationReader(path)
    if reader.run.get("ids_sha256") != wanted["ids_sha256"] or list(reader.shape[:2]) != wanted["shape"]:
        raise DataError("the teacher's states belong to other windows", where=path, mend=_AGAIN)
    if any(reader.run.get(key) != wanted[key] for key in ("teacher", "config_sha256")):
        raise DataError("the teacher's states belong to another teacher", where=path, mend=_AGAIN)
    if reader.run.get("layer") != layer:
        found, asked = (f"of layer {n}" if n is not None else "final" for n in (reader.run.get("layer"), layer))
        raise DataError(f"the teacher's states are {found} ones, not {asked} ones", where=path, mend=_AGAIN)
    if reader.dtype != dtype:
        found, asked = torch_name(reader.dtype), torch_name(dtype)
        raise DataError(f"the teacher's states are {found}, and training computes in {asked}", where=path, mend=_AGAIN)
    return reader


def check_teacher(teacher: str | Path, student: str | Path) -> None:
    """Raise a CheckpointError for a teacher that is no dense model of the student's tokens; from small files alone.

    Nobody wants to be taught what missing layers come to, or compares logits of other tokens.
    """
    mend = "name the dense model that the student was cut from, or one tuned from it"
    layout = read_layout(teacher)
    if layout and layout.dropped:
        told = f"the teacher is a pruned model: its manifest.json drops layers {list(layout.dropped)}"
        raise CheckpointError(told, where=teacher, mend=mend)
    sizes = [read_config(folder).get("vocab_size") for folder in (student, teacher)]
    if sizes[0] != sizes[1]:
        told = f"the teacher's vocabulary has {sizes[1]} tokens, the student's {sizes[0]}"
        raise CheckpointError(told, where=teacher, mend=mend)
