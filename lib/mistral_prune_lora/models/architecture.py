"""The parts of a model's own transformers class, without weights: decoder, decoder layer, rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig


def empty_decoder(config: PreTrainedConfig, device: torch.device | str = "cpu") -> nn.Module:
    """The decoder of this configuration, from embedding to final norm, its parameters on the meta device.

    It is made whole, with all its layers, because a decoder decides when it is made which attention masks it will need.

    Args:
        config: the model's configuration, which the decoder keeps.
        device: of the rotary embedding, which has no parameters and is real.
    """
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
    renew_rotary_embedding(decoder, device)
    return decoder


def renew_rotary_embedding(decoder: nn.Module, device: torch.device | str) -> None:
    """Give a decoder that was made on the meta device a rotary embedding with numbers: it is computed, not stored."""
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)


def empty_layer(config: PreTrainedConfig, index: int) -> nn.Module:
    """One decoder layer of this configuration, its parameters on the meta device.

    Args:
        config: decides class and geometry.
        index: original layer index: for a KV cache, and for families whose layers differ in their attention.
    """
    config_class: type = type(config)  # a class can be hashed, whatever its instances can
    layer_class = _layer_class(config_class)
    with torch.device("meta"):
        return layer_class(config, index)


@cache
def _layer_class(config_class: Callable[..., PreTrainedConfig]) -> type[nn.Module]:
    # A configuration of its own, of one layer: the model's may list the kind of each of its layers.
    return type(empty_decoder(config_class(num_hidden_layers=1)).get_submodule("layers.0"))
