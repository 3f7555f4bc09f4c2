"""What a check has found, and how two things are held against each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

NOT_HAD = "n/a"  # the figure of what cannot be measured on a device


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        what: what was looked at.
        figure: what was found, in words.
        bound: what is allowed, in words; empty where nothing is.
        ok: whether the figure is within the bound; None where it is only told, or could not be had.
    """

    what: str
    figure: str
    bound: str = ""
    ok: bool | None = None

    @property
    def verdict(self) -> str:
        """One word: ok, FAILED, told, or n/a."""
        if self.figure == NOT_HAD:
            return NOT_HAD
        return {True: "ok", False: "FAILED", None: "told"}[self.ok]


def within(what: str, figure: float, bound: float, unit: str = "") -> Finding:
    """A number that must not be above another; NaN is."""
    return Finding(what, f"{figure:.3g}{unit}", f"at most {bound:g}{unit}", figure <= bound)


def largest(figures: Iterable[float]) -> float:
    """The largest of some numbers; NaN if one of them is, which `max` passes over wherever it is not the first."""
    given = list(figures)
    return math.nan if any(map(math.isnan, given)) else max(given)


def same_bits(what: str, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> Finding:
    """That tensors by name are the same: names, dtypes, shapes, and every bit; nothing is not the same as nothing.

    Args:
        what: the row's words.
        first, second: on the CPU.
    """
    if first.keys() != second.keys():
        return Finding(what, f"{len(first.keys() ^ second.keys())} names differ", "the same bits", False)
    differ = total = 0
    for name, one in first.items():
        other = second[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return Finding(what, f"{name} is of another dtype or shape", "the same bits", False)
        differ += _differing(one, other)
        total += one.numel()
    return Finding(what, f"{differ} of {total} numbers differ", "the same bits", differ == 0 and total > 0)


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, by the largest of the wanted numbers; float64 inside. NaN where one is NaN."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many numbers of two tensors of one dtype and shape differ in a bit."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[one.element_size()]
    return int((one.contiguous().view(kind) != other.contiguous().view(kind)).sum())
