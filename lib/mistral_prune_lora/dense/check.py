"""Whether a directory holds a whole dense model, told from the headers of its files alone."""

from __future__ import annotations

from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.family_tensors import check_model_tensors
from mistral_prune_lora.checkpoints.tokenizer import tokenizer_files
from mistral_prune_lora.errors import CheckpointError, SourceError
from mistral_prune_lora.models.config import model_config


def check_dense(path: str | Path) -> None:
    """Check that a directory holds a whole dense model and its tokenizer, from the files' headers alone.

    Raises:
        CheckpointError: no such directory; files or tensors missing, left over or of the wrong shape; layers dropped.
        SourceError: there is no tokenizer.
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
    model_config(checkpoint)
    layers = range(checkpoint.config["num_hidden_layers"])
    check_model_tensors(checkpoint.config, checkpoint.shapes, layers, path)
    if not tokenizer_files(path):
        raise SourceError("there is no tokenizer", where=path, mend="put the model's tokenizer files there")
