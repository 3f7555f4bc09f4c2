"""How much an adapter changes each weight: the norm of its delta over that of the weight. Nothing is merged."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.merging.arithmetic import Factors, exact_arithmetic
from mistral_prune_lora.merging.plan import MergeSettings, plan_merge
from mistral_prune_lora.storage.safetensors_file import TensorEntry
from mistral_prune_lora.storage.transaction import atomic_file

COLUMNS = ("layer", "module", "rank", "delta_norm", "weight_norm", "strength")
_BLOCK = 1 << 24  # bytes of a weight that are in memory at once


def write_strength(base: str | Path, adapter: str | Path, output: str | Path, settings: MergeSettings) -> None:
    """Write a row for each weight that an adapter changes, in the order of layers, as CSV of COLUMNS.

    Layers are the dense model's; `module` is the projection's name in its layer, `mlp.up_proj`, or `lm_head`, whose
    layer is empty. Norms are Frobenius's, in float64, of the weight as it is stored; `strength` is their ratio, empty
    where the weight is zero.

    Args:
        base: the part before.
        adapter: what would be merged into it.
        output: the table.
        settings: of that merge.

    Raises: as `plan.plan_merge`, for an adapter that could not be merged.
    """
    plan = plan_merge(base, [adapter], settings)
    rows = []
    with exact_arithmetic():
        for item in plan.items:
            for update in item.updates:
                factors = Factors.load(update, torch.device("cpu"))
                weight = math.sqrt(sum(_squares(block) for _, block in _blocks(item.entry)))
                delta = delta_norm(factors, item.entry)
                name = LAYER_PREFIX.sub("", update.module)
                place = -1 if update.layer is None else update.layer
                rows.append((place, name, len(factors.a), delta, weight, delta / weight if weight else ""))
    with atomic_file(output) as fresh, open(fresh, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(("" if row[0] < 0 else row[0], *row[1:]) for row in sorted(rows, key=lambda row: row[:2]))


def delta_norm(factors: Factors, weight: TensorEntry) -> float:
    """The Frobenius norm of what an update adds to a weight.

    Of LoRA's s B A it needs no matrix of the weight's size: |B A|^2 = tr(A^T B^T B A) = sum(B^T B * A A^T), of two
    matrices (r, r). DoRA's difference, m / |W + s B A| (W + s B A) - W over each row, is summed block by block.
    """
    if factors.magnitude is None:
        a, b = factors.a.double(), factors.b.double()
        # Rounding can leave a sum of squares that is zero a little below it.
        return abs(factors.scaling) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
    squares = 0.0
    for first, block in _blocks(weight):
        stored = block.float()
        merged = factors.add_to(stored.clone(), slice(first, first + len(stored)))
        squares += _squares(merged - stored)
    return math.sqrt(squares)


def _blocks(entry: TensorEntry) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a weight in its stored dtype, a few at a time, each time with the number of the first."""
    count = max(1, _BLOCK * entry.shape[0] // max(1, entry.nbytes))
    for first in range(0, entry.shape[0], count):
        yield first, entry.read(slice(first, min(first + count, entry.shape[0])))


def _squares(block: torch.Tensor) -> float:
    return float(block.double().square().sum())
