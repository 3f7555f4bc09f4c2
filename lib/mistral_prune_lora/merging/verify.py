"""A merged result held against its inputs as it comes back from the disk, before it is put in place.

What is proved of each file, and how:

- Every byte that was sent to the disk is the byte that the disk gives back: they are compared one by one, which leaves
  nothing to chance, where a second digest would leave a little and cost ten times as much. The digest in the record is
  of the bytes that came back.
- They came back from the device and not from our memory, as far as a reader can tell (see `read_back.ReadBack`).
- What was sent is what should have been: of each merged weight a sample of rows is computed again in float64, from its
  source, and must agree within what float32 products and one rounding an adapter can differ by; of each other tensor
  the first and last bytes are those of its source; and the header, read once more when the file is complete, has every
  tensor once, with its dtype and shape, and no other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.merging.tensor_files import Item
from mistral_prune_lora.storage.dtypes import DTYPES
from mistral_prune_lora.storage.safetensors_file import plan_file, read_header, tensor_bytes

_EDGE_NUMBERS = 1 << 15  # of each tensor that nothing is added to, at both ends


@dataclass(frozen=True)
class _Sample:
    """A stretch of the file, and what judges its bytes."""

    first: int
    last: int
    judge: Callable[[bytearray], None]


class FileCheck:
    """The check of one output file, which passes through it from beginning to end.

    Give it to `stream.stream_file` as `compare`, and `finish` it afterwards.

    Attributes:
        values: how many merged values were recomputed so far.
    """

    def __init__(self, name: str, items: list[Item]) -> None:
        """Plan the check of a file from its tensors, in any order."""
        self.values = 0
        self._name, self._items = name, {item.spec.name: item for item in items}
        self._position, self._gathered = 0, bytearray()
        head, ordered = plan_file(item.spec for item in items)
        self._starts: list[tuple[int, str]] = [(0, "the header")]
        self._samples: deque[_Sample] = deque([_Sample(0, len(head), partial(self._judge_head, head))])
        position = len(head)
        for spec in ordered:
            self._starts.append((position, spec.name))
            self._samples.extend(self._samples_of(self._items[spec.name], position))
            position += spec.nbytes

    def __call__(self, written: np.ndarray, read: np.ndarray) -> None:
        """Check the next bytes of the file.

        Args:
            written: as they were sent to the disk, uint8.
            read: as they came back, of the same size.

        Raises:
            CheckpointError: they are not what they should be: a fault of this machine or of this program.
        """
        if not _equal(written, read):
            place = self._position + int(np.flatnonzero(written != read)[0])
            tensor = [name for start, name in self._starts if start <= place][-1]
            raise self._failed(f"the bytes of {tensor} are not those that were written")
        start, end = self._position, self._position + len(read)
        while self._samples and self._samples[0].first < end:
            sample = self._samples[0]
            self._gathered += read.data[max(sample.first - start, 0) : sample.last - start]
            if sample.last > end:
                break
            sample.judge(self._gathered)
            self._gathered = bytearray()
            self._samples.popleft()
        self._position = end

    def finish(self, path: Path) -> int:
        """Check the header of the complete file; returns how many merged values were recomputed.

        Raises:
            CheckpointError: as for the bytes; or not all of the file has come by.
        """
        if self._samples:
            raise self._failed("it ends before its tensors do")
        written = {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()}
        if written != {name: (item.spec.dtype, item.spec.shape) for name, item in self._items.items()}:
            raise self._failed("its tensors are not those that were planned")
        return self.values

    def _samples_of(self, item: Item, start: int) -> list[_Sample]:
        size, itemsize = item.spec.nbytes, DTYPES[item.spec.dtype].itemsize
        if item.updates:
            count = item.spec.shape[0]
            row = size // count
            chosen = sorted({0, count // 3, 2 * count // 3, count - 1})
            return [_Sample(start + i * row, start + (i + 1) * row, partial(self._judge_row, item, i)) for i in chosen]
        edge = _EDGE_NUMBERS * itemsize
        stretches = [(0, edge), (size - edge, size)] if size > 2 * edge else [(0, size)] if size else []
        return [_Sample(start + a, start + b, partial(self._judge_copied, item, a, b)) for a, b in stretches]

    def _judge_head(self, head: bytes, found: bytearray) -> None:
        if found != head:
            raise self._failed("its header is not the one that was planned")

    def _judge_row(self, item: Item, row: int, found: bytearray) -> None:
        exact, bound = _merged_row(item, row)
        values = torch.frombuffer(found, dtype=DTYPES[item.spec.dtype]).double()
        if not ((values - exact).abs() <= bound).all():
            raise self._failed(f"row {row} of {item.spec.name} is not the merged one")
        self.values += len(values)

    def _judge_copied(self, item: Item, first: int, last: int, found: bytearray) -> None:
        dtype = DTYPES[item.spec.dtype]
        flat = replace(item.entry, shape=(math.prod(item.entry.shape),))
        source = flat.read(slice(first // dtype.itemsize, last // dtype.itemsize))
        if found != tensor_bytes(source.to(dtype)):
            raise self._failed(f"{item.spec.name} is not the one that was copied")

    def _failed(self, what: str) -> CheckpointError:
        mend = "merge again; if it fails again, check the disk and the memory"
        return CheckpointError(f"the merged file failed its check: {what}", where=self._name, mend=mend)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two stretches of bytes are the same; eight at a time, which makes the comparison's own result small."""
    whole = len(first) // 8 * 8
    return np.array_equal(first[:whole].view(np.uint64), second[:whole].view(np.uint64)) and np.array_equal(
        first[whole:], second[whole:]
    )


def _merged_row(item: Item, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a row of a merged weight in float64, how far each of its values may be from that).

    Bound: each adapter rounds once to the weight's dtype and its float32 product of rank r errs by at most (r + 2)
    units of 2^-24 of the sum of absolute products (Higham, Accuracy and Stability, section 3.1).
    """
    rows, dtype = slice(row, row + 1), DTYPES[item.spec.dtype]
    rounding = torch.finfo(dtype).eps
    exact = item.entry.read(rows).to(dtype).double()
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
        bound += rounding * (exact.abs() + bound) + torch.finfo(dtype).tiny
    return exact.view(-1), bound.view(-1)
