"""Examples in windows: each in one of its own, or several beside each other; what is left is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mistral_prune_lora.text.examples import Example


def placed(lengths: Sequence[int], seqlen: int, *, packing: bool) -> list[list[int]]:
    """Which examples stand in which window, by their numbers.

    Args:
        lengths: of the examples, each at most seqlen.
        seqlen: ids in a window.
        packing: put each example, in its turn, into the first window with room for it; else each has its own.
    """
    if not packing:
        return [[number] for number in range(len(lengths))]
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for number, length in enumerate(lengths):
        fits = room[: len(rows)] >= length
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = seqlen
        rows[row].append(number)
        room[row] -= length
    return rows


def laid_out(
    examples: Sequence[Example], rows: Sequence[Sequence[int]], seqlen: int, *, padding: int, left: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows of examples: ids (int32), positions (int32) and which tokens are scored (bool), shape (windows, seqlen).

    Padding is a document of its own, so that nothing attends to it and its place changes nothing.

    Args:
        examples: with their scored ids.
        rows: the numbers of the examples in each window, as `placed` gives them.
        seqlen: ids in a window.
        padding: the id that fills a window.
        left: whether the padding comes first.
    """
    shape = (len(rows), seqlen)
    ids, positions = np.full(shape, padding, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    scored = np.zeros(shape, dtype=bool)
    for row, numbers in enumerate(rows):
        spare = seqlen - sum(len(examples[number].ids) for number in numbers)
        at = spare if left else 0
        positions[row, at - spare : at] = np.arange(spare) if left else ()
        for number in numbers:
            example = examples[number]
            end = at + len(example.ids)
            ids[row, at:end], positions[row, at:end] = example.ids, np.arange(len(example.ids))
            for first, behind in example.answers:
                scored[row, at + max(first, 1) : at + behind] = True
            at = end
        positions[row, at:] = np.arange(seqlen - at)
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(scored)
