"""What makes a number on some windows doubtful without making it wrong: said, and kept with the result."""

from __future__ import annotations

import sys

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.tokenizer import is_tokenizer_of, own_tokenizer
from mistral_prune_lora.errors import printable
from mistral_prune_lora.text.windows import Windows


def warn_of(model: Checkpoint, windows: Windows) -> list[str]:
    """Say on stderr what speaks against these windows for this model, and return it for the record.

    Args:
        model: a model's directory, with its own tokenizer or without one.
        windows: that it is measured or trained on.

    Returns:
        A sentence for each doubt: windows longer than the positions that the model was made for; token ids of another
        tokenizer than its own.
    """
    doubts, limit = [], model.config.get("max_position_embeddings")
    if isinstance(limit, int) and windows.seqlen > limit:
        doubts.append(
            f"windows of {windows.seqlen} tokens are longer than the {limit} positions that the model was made for"
            " (max_position_embeddings)"
        )
    own, told = own_tokenizer(model.path), windows.identity
    if own is not None and not is_tokenizer_of(own, told.tokenizer, told.tokenizer_sha256):
        doubts.append(f"the token ids are of the tokenizer {told.tokenizer}, which is not the model's own, {own}")
    for doubt in doubts:
        print(f"warning: {printable(doubt)}", file=sys.stderr)
    return doubts
