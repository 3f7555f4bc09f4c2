"""What may be chosen: blocks of layers to drop, one layer more to drop, and which of the dropped ones B restores.

A candidate is named by the layers that it runs without, ascending. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mistral_prune_lora.errors import LayoutError

Missing = tuple[int, ...]  # the layers that a candidate runs without; () is the dense model
MOST_SPLITS = 1000


def running(num_layers: int, missing: Missing) -> tuple[int, ...]:
    """The layers that a candidate runs."""
    gone = set(missing)
    return tuple(layer for layer in range(num_layers) if layer not in gone)


def blocks(num_layers: int, drop: int, *, keep_last_layer: bool) -> list[Missing]:
    """Every block of `drop` consecutive layers that may go, by its first layer.

    Raises:
        LayoutError: there is none.
    """
    check_drop(num_layers, drop)
    last = num_layers - drop - keep_last_layer
    return [tuple(range(start, start + drop)) for start in range(last + 1)]


def one_more(num_layers: int, dropped: Missing, *, keep_last_layer: bool) -> list[Missing]:
    """What remains if one layer more is dropped, for each that may be."""
    left = running(num_layers - keep_last_layer, dropped)
    return [tuple(sorted((*dropped, layer))) for layer in left]


def check_drop(num_layers: int, drop: int) -> None:
    """Raise a LayoutError unless so many layers can be dropped with one at least kept."""
    if not 1 <= drop < num_layers:
        raise LayoutError(
            f"{drop} of {num_layers} layers cannot be dropped",
            where="--drop",
            mend=f"drop 1 to {num_layers - 1}",
        )


def check_splits(drop: int, sizes: Sequence[int], *, every: bool) -> None:
    """Raise a LayoutError unless so many layers can be parted into B of these sizes and C, in at most MOST_SPLITS ways.

    Args:
        drop: how many are dropped.
        sizes: of B.
        every: whether all ways are run, see `splits`.
    """
    wrong = [size for size in sizes if not 0 < size < drop]
    if wrong:
        raise LayoutError(
            f"B cannot have {wrong[0]} of {drop} dropped layers, with some left for C",
            where="--b_sizes",
            mend=f"use sizes from 1 to {drop - 1}" if drop > 1 else "drop two layers or more, or name no size",
        )
    count = sum(math.comb(drop, size) for size in sizes)
    if every and count > MOST_SPLITS:
        raise LayoutError(
            f"there are {count} ways to part {drop} layers, and {MOST_SPLITS} are the most that are run",
            where="--splits",
            mend="name fewer sizes with --b_sizes, or use --splits contiguous",
        )


def splits(dropped: Missing, sizes: Sequence[int], *, every: bool) -> list[tuple[Missing, Missing]]:
    """The ways to part dropped layers into B, which is restored first, and C.

    Args:
        dropped: the layers.
        sizes: of B, as `check_splits` takes them.
        every: all ways; else those in which B is the first or the last so many of them.

    Returns:
        (B, C), by the sizes in their order.
    """
    found = []
    for size in dict.fromkeys(sizes):
        ways = itertools.combinations(dropped, size) if every else [dropped[:size], dropped[-size:]]
        found += [(b, tuple(layer for layer in dropped if layer not in b)) for b in ways]
    return found
