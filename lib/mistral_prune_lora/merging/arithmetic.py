"""What a merge computes: a block of a stored tensor, cast and with its updates added, with PEFT's bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mistral_prune_lora.checkpoints.adapter import Update
from mistral_prune_lora.storage.dtypes import DTYPES


@dataclass(frozen=True)
class Factors:
    """The factors of one update in float32: PEFT casts 16-bit adapters up when it loads them."""

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    scaling: float

    @classmethod
    def load(cls, update: Update, device: torch.device) -> Factors:
        """Read them."""
        magnitude = update.magnitude.read().float().view(-1).to(device) if update.magnitude else None
        return cls(update.a.read().float().to(device), update.b.read().float().to(device), magnitude, update.scaling)

    def add_to(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """The rows of a weight with this update merged, in the weight's dtype; may reuse its memory.

        LoRA: W + (B A) s, rounded once to the weight's dtype (https://arxiv.org/abs/2106.09685, section 4.1). DoRA:
        m / |W + (B A) s| times that, with the norm over each row in float32 (https://arxiv.org/abs/2402.09353,
        equation 5).
        """
        # Products are scaled after they are summed, as PEFT does: s B first, or addmm, would round otherwise.
        summed = (self.b[rows] @ self.a).mul_(self.scaling).add_(weight)
        if self.magnitude is not None:
            norm = torch.linalg.norm(summed, dim=1)
            summed.mul_((self.magnitude[rows] / norm).view(-1, 1))
        return weight.copy_(summed)


def cast_in(buffer: torch.Tensor, nbytes: int, stored: str, wanted: str) -> int:
    """Cast the numbers at the start of a buffer where they lie, rounding as `Tensor.to` does.

    Args:
        buffer: uint8, with room for the result.
        nbytes: how many of its bytes hold numbers.
        stored, wanted: safetensors dtype names.

    Returns:
        How many bytes hold them now.
    """
    cast = buffer[:nbytes].view(DTYPES[stored]).to(DTYPES[wanted])
    buffer[: cast.nbytes].view(DTYPES[wanted]).copy_(cast)
    return cast.nbytes


def merge_rows(rows: torch.Tensor, first: int, factors: Sequence[Factors], device: torch.device) -> None:
    """Add updates, one after the other, to some rows of a weight where they lie.

    Args:
        rows: shape (rows, columns), on the CPU.
        first: the number of the first of them in the whole weight.
        factors: of the whole weight's updates, on `device`.
        device: where to compute.
    """
    weight = rows.to(device)
    for update in factors:
        weight = update.add_to(weight, slice(first, first + len(weight)))
    if weight is not rows:
        rows.copy_(weight)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """One thread for torch, so that results do not depend on how many there are, and no TF32 on a GPU.

    With two threads MKL was seen to round products of a few small odd shapes otherwise (7 x 11 by 11 x 22), so there
    PEFT's own bits depend on its threads; at the shapes of real models they did not.
    """
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32
