"""Whether a directory holds a whole dense model, told from headers alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.family_tensors import check_model_tensors
from mistral_prune_lora.errors import CheckpointError


def open_dense(path: str | Path) -> Checkpoint:
    """Open a dense model's directory, all of whose tensors must be there by the files' headers.

    Raises:
        CheckpointError: no such directory; files or tensors missing, left over or of the wrong shape; layers dropped.
        LayoutError: there are no weights, or their index is malformed.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.kind != "model":
        raise CheckpointError("is a bundle, not a dense model", where=path, mend="give the dense model's directory")
    if checkpoint.layout and checkpoint.layout.dropped:
        raise CheckpointError(
            f"is a pruned model: its manifest.json drops layers {list(checkpoint.layout.dropped)}",
            where=path,
            mend="give the dense model it was cut from",
        )
    layers = range(checkpoint.config["num_hidden_layers"])
    check_model_tensors(checkpoint.config, checkpoint.shapes, layers, path)
    return checkpoint
