"""The processes that train one adapter together, as `torchrun` starts them; a single one otherwise.

Each takes its share of an update's forward passes, and all of them make the same update from the sum of their
gradients. What is written, the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from mistral_prune_lora.distillation.schedule import processes

_LONGEST_WAIT = timedelta(days=7)  # while the first process runs all windows through frozen layers


@dataclass(frozen=True)
class Ranks:
    """Attributes: rank: this process, from 0; world: how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, things: Sequence) -> list:
        """This process's part of what all of them do."""
        return list(things[self.rank :: self.world])

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace tensors by their sums over all processes."""
        if self.world == 1:
            return
        # One message: a LoRA adapter is hundreds of small matrices.
        for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
            same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            distributed.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.world == 1:
            return flag
        told = torch.tensor([float(flag)], device="cuda" if distributed.get_backend() == "nccl" else "cpu")
        distributed.all_reduce(told)
        return bool(told.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes that `torchrun` has started; alone without it.

    Args:
        device: that is computed on; tells what the processes talk through.
    """
    world = processes()
    if world == 1:
        yield Ranks()
        return
    local_device(device)  # before anything is sent from a GPU
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield Ranks(distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several on one machine, each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or local is None:
        return device
    own = torch.device("cuda", int(local))
    torch.cuda.set_device(own)
    return own
