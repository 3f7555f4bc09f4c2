"""A correction of one layer's `down_proj`, beside the layer while it is streamed and as LoRA's factors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import nn

from mistral_prune_lora.storage.safetensors_file import tensor_bytes

MODULE = "mlp.down_proj"


@dataclass(frozen=True)
class Correction:
    """What is added to a layer's `down_proj`: B A, with a scaling of 1. An `UnmergedAdapter` of the stream.

    Attributes:
        layer: original index.
        a, b: float32, shapes (rank, inner) and (hidden, rank).
        about: how it was found, for the record.
    """

    layer: int
    a: torch.Tensor = field(repr=False)
    b: torch.Tensor = field(repr=False)
    about: dict

    name = "closed form"

    def digest(self, index: int) -> str:
        """See `UnmergedAdapter.digest`."""
        digest = hashlib.sha256()
        for factor in (self.a, self.b) if index == self.layer else ():
            digest.update(tensor_bytes(factor))
        return digest.hexdigest()

    def wrap(self, layer: nn.Module, index: int) -> None:
        """Add it to the weight as a merge does: in float32, rounded once to the weight's dtype."""
        if index == self.layer:
            weight = layer.get_submodule(MODULE).get_parameter("weight").data
            weight.copy_(self.b.to(weight.device) @ self.a.to(weight.device) + weight)


class FeatureTap:
    """Looks at what enters a streamed layer's `down_proj`; an `UnmergedAdapter` that changes nothing.

    Attributes:
        features: of the last batch, shape (n, seqlen, inner).
    """

    name = "tap"
    features: torch.Tensor

    def digest(self, index: int) -> str:
        """Nothing is changed."""
        return ""

    def wrap(self, layer: nn.Module, index: int) -> None:
        """Listen to the projection."""
        layer.get_submodule(MODULE).register_forward_pre_hook(self._take)

    def _take(self, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self.features = given[0]
