"""A merged result read back and held against its inputs before it is put in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mistral_prune_lora.digest import file_sha256
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.merge_plan import Item, MergePlan
from mistral_prune_lora.safetensors_file import DTYPES, TensorEntry, read_header

_EDGE_BYTES = 1 << 16  # of each copied tensor, at both ends


def verify_merge(plan: MergePlan, folder: Path, digests: Mapping[str, str]) -> int:
    """Check a written result; returns how many merged values were recomputed.

    The files, read back whole, have the sha256 of the bytes that went into them. Every tensor is there once, with its
    dtype and shape, and no other. Of each merged weight a sample of rows is computed again in float64 and must agree
    within what float32 products and one rounding an adapter can differ by. Of each copied tensor the first and last
    bytes are those of its source.

    Args:
        plan: what was to be done.
        folder: where the result lies.
        digests: by file name, the sha256 of what was written, taken before it was written.

    Raises:
        CheckpointError: the result is not what it should be: a fault of this machine or of this program.
    """
    values = 0
    for name, items in plan.files.items():
        if file_sha256(folder / name) != digests[name]:
            raise _failed(name, "its bytes are not those that were written")
        written = read_header(folder / name)
        specs = {item.spec.name: (item.spec.dtype, item.spec.shape) for item in items}
        if {n: (e.dtype, e.shape) for n, e in written.items()} != specs:
            raise _failed(name, "its tensors are not those that were planned")
        for item in items:
            entry = written[item.spec.name]
            values += _check_merged(item, entry, name) if item.updates else _check_copied(item, entry, name)
    return values


def _check_merged(item: Item, written: TensorEntry, name: str) -> int:
    """Bound: each adapter rounds once to the weight's dtype and its float32 product of rank r errs by at most
    (r + 2) units of 2^-24 of the sum of absolute products (Higham, Accuracy and Stability, section 3.1)."""
    count = item.spec.shape[0]
    rounding = torch.finfo(DTYPES[item.spec.dtype]).eps
    checked = 0
    for row in sorted({0, count // 3, 2 * count // 3, count - 1}):
        rows = slice(row, row + 1)
        exact = item.entry.read(rows).double()
        bound = torch.zeros_like(exact)
        for update in item.updates:
            a, b = update.a.read().float().double(), update.b.read(rows).float().double()
            delta, products = (b @ a) * update.scaling, (b.abs() @ a.abs()) * abs(update.scaling)
            bound += (len(a) + 2) * 2.0**-24 * (products + exact.abs())
            exact = exact + delta
            if update.magnitude is not None:
                magnitude = update.magnitude.read().float().double().view(-1)[rows].view(-1, 1)
                factor = magnitude / exact.norm(dim=1, keepdim=True)
                # The norm sums `columns` squares in float32, and its relative error carries over to every value.
                exact = exact * factor
                bound = (bound * factor.abs()) + exact.abs() * 2.0**-24 * exact.shape[1]
            bound += rounding * (exact.abs() + bound) + torch.finfo(DTYPES[item.spec.dtype]).tiny
        difference = (written.read(rows).double() - exact).abs()
        if not (difference <= bound).all():
            raise _failed(name, f"row {row} of {item.spec.name} is not the merged one")
        checked += exact.numel()
    return checked


def _check_copied(item: Item, written: TensorEntry, name: str) -> int:
    def edges(entry: TensorEntry) -> bytes:
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            first = file.read(min(_EDGE_BYTES, entry.nbytes))
            file.seek(entry.start + max(0, entry.nbytes - _EDGE_BYTES))
            return first + file.read(min(_EDGE_BYTES, entry.nbytes))

    if edges(item.entry) != edges(written):
        raise _failed(name, f"{item.spec.name} is not the one that was copied")
    return 0


def _failed(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the merged file failed its check: {what}", where=name, mend="merge again; if it fails again, check the memory"
    )
