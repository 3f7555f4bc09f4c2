"""How much memory of the device something takes at most."""

from __future__ import annotations

import gc

import torch


class Peak:
    """A context manager that measures what is allocated on a GPU within it, beyond what was before.

    Attributes:
        nbytes: the largest sum of what was allocated at once; None on a CPU, where torch does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.nbytes: int | None = None
        self._device, self._before = device, 0

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            # cuBLAS takes its workspace at its first product and keeps it: it is nobody's.
            torch.ones(64, 64, device=self._device) @ torch.ones(64, 64, device=self._device)
            gc.collect()
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.nbytes = torch.cuda.max_memory_allocated(self._device) - self._before
