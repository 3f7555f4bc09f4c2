"""Numbers that are none: where NaN and infinity stand, and which tensor on disk brought them."""

from __future__ import annotations

import torch

from mistral_prune_lora.errors import NumberError
from mistral_prune_lora.safetensors_file import TensorEntry


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; waits for its device.

    Least and greatest element are looked at, and a NaN is both: one pass at the speed of memory, and no copy.
    """
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def first_not_finite(rows: torch.Tensor) -> int | None:
    """The first index of the first dimension under which a NaN or infinity stands; None if all numbers are finite."""
    if all_finite(rows):
        return None
    return next(number for number, row in enumerate(rows) if not all_finite(row))


def tensor_fault(entry: TensorEntry, dtype: torch.dtype, rows: slice | None = None) -> NumberError | None:
    """The error for a stored tensor that gives no numbers in a dtype; None for one that does.

    Args:
        entry: the tensor.
        dtype: that it is computed with.
        rows: which of its rows to look at; None means all.
    """
    stored = entry.read(rows)
    name = entry.stored_name if rows is None else f"{entry.stored_name}, row {rows.start},"
    if not all_finite(stored):
        return NumberError(
            f"tensor {name} holds NaN or infinity", where=entry.file, mend="Fetch, merge or train these weights again"
        )
    if not all_finite(stored.to(dtype)):
        return NumberError(f"tensor {name} holds numbers too large for {dtype}", where=entry.file, mend=mend_for(dtype))
    return None


def mend_for(dtype: torch.dtype) -> str:
    """What to do where finite weights lead to numbers that a dtype does not have."""
    if dtype is torch.float16:
        return "Use bf16 or fp32: numbers of fp16 end at 65504"
    return "Use the weights of a trained model: these lead to numbers of no meaning"
