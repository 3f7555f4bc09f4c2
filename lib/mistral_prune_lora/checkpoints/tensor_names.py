"""The canonical names of a model's tensors, by which everything here speaks of them whatever a file calls them."""

from __future__ import annotations

import re

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
HEAD_MODULE = "lm_head"
LAYERS = "model.layers."
LAYER_PREFIX = re.compile(r"model\.layers\.(\d+)\.")


def layer_prefix(layer: int) -> str:
    """What the names of a decoder layer's modules and tensors begin with: "model.layers.21."."""
    return f"{LAYERS}{layer}."
