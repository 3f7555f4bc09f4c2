"""How to compute, and how many layers fit into memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.sizes import size_text
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
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int = 1
    max_memory: int | None = None

    @classmethod
    def named(cls, device: str, dtype: str, batch_size: int = 1, max_memory: int | None = None) -> Compute:
        """As people name them: a device as for `device.resolve_device`; "bf16", "fp16" or "fp32"."""
        return cls(resolve_device(device), COMPUTE_DTYPES[dtype], batch_size, max_memory)

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


def resident_groups(
    sources: Sequence[LayerSource], compute: Compute, config: PreTrainedConfig, seqlen: int, reserved: int = 0
) -> list[list[LayerSource]]:
    """Consecutive layers that fit into memory together, in order.

    Args:
        sources: the layers to run, in order.
        compute: gives budget, dtype and batch size.
        config: the model's geometry.
        seqlen: token ids in a window.
        reserved: bytes that something else on the device takes, such as the head.

    Raises:
        PipelineError: not even one layer fits.
    """
    sizes = [source.nbytes(compute.dtype) for source in sources]
    memory, beside = compute.memory, reserved + working_bytes(compute, config, seqlen)
    # On a GPU the next group is copied while one computes.
    copies = 2 if compute.device.type == "cuda" and sum(sizes) > memory - beside else 1
    budget = (memory - beside) // copies
    if sizes and max(sizes) > budget:
        raise PipelineError(
            f"one layer, its hidden states and the head do not fit into {size_text(memory)}",
            where="--max_memory",
            mend=f"Allow {size_text(beside + copies * max(sizes))} or more, or use a smaller batch or dtype",
        )
    groups: list[list[LayerSource]] = []
    used = 0
    for source, size in zip(sources, sizes, strict=True):
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(source)
        used += size
    return groups


def working_bytes(compute: Compute, config: PreTrainedConfig, seqlen: int) -> int:
    """An upper estimate of what one layer's forward pass holds beside its weights, attention scores included."""
    tokens = compute.batch_size * seqlen
    width = 8 * config.hidden_size + 3 * config.intermediate_size
    mask = seqlen * seqlen if getattr(config, "sliding_window", None) else 0
    return tokens * width * max(4, compute.dtype.itemsize) + mask
