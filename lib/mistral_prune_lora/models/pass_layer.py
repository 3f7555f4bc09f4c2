"""The layer that stands in for a dropped one."""

from __future__ import annotations

import torch
from torch import nn


class PassLayer(nn.Module):
    """A decoder layer without parameters that hands its hidden states on unchanged.

    Args:
        layer_idx: the original index of the layer it replaces.

    A KV cache measures its length by the first layer of each kind of attention alone. Where that layer is this one, a
    key and value of one number a token keep the count (an empty tensor counts as length 0), or generation would start
    each step at position 0, or with a mask for too few tokens.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args, past_key_values=None, **kwargs) -> torch.Tensor:
        """Return `hidden_states`, shape (batch, tokens, hidden)."""
        if past_key_values is not None:
            batch, tokens, _ = hidden_states.shape
            counted = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(counted, counted, self.layer_idx)
        return hidden_states
