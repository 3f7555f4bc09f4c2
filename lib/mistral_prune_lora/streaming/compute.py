"""How to compute: where, in which dtype, how many windows at once, in how much memory; and a layer to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import nn

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES

# Of what is free; the rest is for whoever else is on the machine, and for the page cache that weights are read through.
# A CPU gains nothing from more layers at once but fewer trips of the hidden states to disk, so it takes less.
_SHARE_OF_FREE_MEMORY = {"cuda": 0.5, "cpu": 0.25}


@dataclass(frozen=True)
class Compute:
    """How to compute: where, in which dtype, how many windows at once, in how much memory.

    Attributes:
        device: of weights and arithmetic.
        dtype: of weights and hidden states.
        batch_size: windows that go through a layer together.
        max_memory: bytes for weights and hidden states on the device; None means half of what is free on a GPU, a
            quarter of what is free on a CPU.
        overlap: whether layers and batches are loaded, and results stored, while others are computed. Only time and
            memory depend on it, no bit of a result, so no record holds it.
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int = 1
    max_memory: int | None = None
    overlap: bool = True

    @classmethod
    def named(cls, device: str, dtype: str, batch_size: int = 1, max_memory: int | None = None) -> Compute:
        """As people name them: a device as for `device.resolve_device`; "bf16", "fp16" or "fp32"."""
        return cls(resolve_device(device), COMPUTE_DTYPES[dtype], batch_size, max_memory)

    @property
    def copies_meanwhile(self) -> bool:
        """Whether anything is copied to or from the device while something else computes there."""
        return self.overlap and self.device.type == "cuda"

    @property
    def memory(self) -> int:
        """The bytes that may be used."""
        if self.max_memory is not None:
            return self.max_memory
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0] * _SHARE_OF_FREE_MEMORY["cuda"])
        return int(psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY["cpu"])


class UnmergedAdapter(Protocol):
    """What a LoRA adapter must offer to be run beside the weights instead of merged into them."""

    name: str

    def digest(self, index: int) -> str:
        """Identifies everything the adapter does to a layer."""

    def wrap(self, layer: nn.Module, index: int) -> None:
        """Put its low-rank paths around the layer's projections, in place."""


@dataclass(frozen=True)
class LayerSource:
    """A decoder layer to run.

    Attributes:
        index: original layer index.
        checkpoint: a model or bundle that holds its weights.
        adapters: put around the layer's projections once it is built, unmerged.
    """

    index: int
    checkpoint: Checkpoint
    adapters: tuple[UnmergedAdapter, ...] = ()

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the layer's weights in `dtype`."""
        entries = self.checkpoint.layer(self.index).values()
        return sum(e.nbytes // e.itemsize * dtype.itemsize for e in entries)
