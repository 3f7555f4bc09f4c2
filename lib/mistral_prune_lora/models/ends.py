"""What stands around a model's layers: the embedding before the first, the norm and the head after the last."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.tensor_names import EMBEDDING, NORM
from mistral_prune_lora.errors import CheckpointError, DataError
from mistral_prune_lora.models.architecture import empty_decoder
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.storage.safetensors_file import TensorEntry


def outside_entries(model: Checkpoint) -> dict[str, TensorEntry]:
    """The tensors around the layers: embedding, final norm, and head unless that is the embedding.

    Raises:
        CheckpointError: one is missing.
    """
    names = dict.fromkeys([EMBEDDING, NORM, head_name(model)])
    missing = [name for name in names if name not in model.entries]
    if missing:
        raise CheckpointError(f"has no tensor {missing[0]}", where=model.path, mend="Fetch or write the model again")
    return {name: model.entries[name] for name in names}


def build_norm(config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The norm between a model's last layer and its head, with its weights, in eval mode."""
    norm = empty_decoder(config).get_submodule("norm")
    norm.load_state_dict({"weight": checkpoint.read(NORM, dtype).to(device)}, assign=True)
    return norm.eval().requires_grad_(False)


class Embedding:
    """A model's embedding table in its stored dtype; only the rows of a batch are cast."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._table, self._dtype = checkpoint.read(EMBEDDING), dtype

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of token ids (n, seqlen): a CPU tensor (n, seqlen, hidden)."""
        return self._table[ids.long()].to(self._dtype)


def check_ids(model: Checkpoint, ids: torch.Tensor) -> None:
    """Raise a DataError if there is a token id that a model has no embedding for; told from headers alone."""
    rows, highest = model.entries[EMBEDDING].shape[0], int(ids.max())
    if highest >= rows:
        raise DataError(
            f"the tokenizer gives the token id {highest}, and the model has {rows} embeddings",
            mend="Use the tokenizer that the model was trained with",
        )
