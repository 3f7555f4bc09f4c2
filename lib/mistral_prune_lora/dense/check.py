"""Whether a directory holds a whole dense model that transformers takes, told from the headers of its files alone."""

from __future__ import annotations

from pathlib import Path

from mistral_prune_lora.checkpoints.dense import open_dense
from mistral_prune_lora.checkpoints.tokenizer import tokenizer_files
from mistral_prune_lora.errors import SourceError
from mistral_prune_lora.models.config import model_config


def check_dense(path: str | Path) -> None:
    """Check that a directory holds a whole dense model and its tokenizer, from the files' headers alone.

    Raises:
        CheckpointError: as `open_dense`, or transformers takes no such configuration.
        LayoutError: as `open_dense`.
        SourceError: there is no tokenizer.
    """
    model_config(open_dense(path))
    if not tokenizer_files(path):
        raise SourceError("there is no tokenizer", where=path, mend="put the model's tokenizer files there")
