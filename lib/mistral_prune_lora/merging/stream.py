"""The merge as a stream: one thread reads, this one computes, one digests, one keeps the disk busy.

Only a few blocks of rows are in memory at a time, in buffers that are used again. A block is small enough that its
float32 delta stays in the cache, which is what makes this several times as fast as whole matrices, and large enough
that matrix products keep the kernel, and so the bits, that they have for the whole matrix.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
import xxhash

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.merging.arithmetic import Factors, cast_in, merge_rows
from mistral_prune_lora.merging.tensor_files import Item
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.dtypes import DTYPES
from mistral_prune_lora.storage.finite import all_finite_bytes
from mistral_prune_lora.storage.read_back import Compare
from mistral_prune_lora.storage.safetensors_file import FileDigests, plan_file, read_into
from mistral_prune_lora.storage.stopwatch import Stopwatch
from mistral_prune_lora.storage.streamed_file import StreamedFile

_BLOCK_BYTES = 2 << 20
# MKL computes products of 1 to 3 rows, and odd rows at the end of a block, by other kernels with other rounding. Blocks
# of a multiple of 64 rows, the last of at least 64, were found to give the bits of the whole product for every shape.
_ROW_MULTIPLE = 64
_BUFFERS = 12
_READ_AHEAD = 16 << 20
_HEAD_BYTES = 128 << 20  # of a file's start that was not read, what is fetched for the sake of its digest


@dataclass(frozen=True)
class _Block:
    """Some rows of one tensor, or some numbers of one that nothing is added to.

    Attributes:
        item: the tensor.
        first, last: where the block lies in the tensor as it is stored, in bytes.
        buffer: uint8; the numbers lie at its start.
        nbytes: their size as they are now.
    """

    item: Item
    first: int
    last: int
    buffer: torch.Tensor
    nbytes: int

    @property
    def data(self) -> np.ndarray:
        """The bytes of the numbers, uint8."""
        return self.buffer[: self.nbytes].numpy()


class InputDigests:
    """The sha256 of input files, taken from the bytes as they pass; a file that was not read straight through is read
    again at the end."""

    def __init__(self) -> None:
        self._running: dict[Path, tuple[hashlib._Hash, int] | None] = {}

    def saw(self, path: Path, start: int, data: memoryview) -> None:
        """Take note of bytes that were read at an offset."""
        if path not in self._running:
            with open(path, "rb") as file:
                head = file.read(start) if start < _HEAD_BYTES else b""
            self._running[path] = (hashlib.sha256(head), start) if len(head) == start else None
        state = self._running[path]
        if state is None:
            return
        if state[1] != start:
            self._running[path] = None
            return
        state[0].update(data)
        self._running[path] = (state[0], start + len(data))

    def finish(self, files: tuple[Path, ...]) -> dict[Path, str]:
        """The digests of some files."""
        return {file: self._digest(file) for file in files}

    def _digest(self, path: Path) -> str:
        state = self._running.get(path)
        return state[0].hexdigest() if state and state[1] == path.stat().st_size else file_sha256(path)


def stream_file(
    path: Path,
    items: list[Item],
    *,
    device: torch.device,
    inputs: InputDigests,
    on_bytes: Callable[[int], object],
    compare: Compare | None = None,
    stopwatch: Stopwatch | None = None,
) -> FileDigests:
    """Write one output file. Call it within `exact_arithmetic`.

    Args:
        path: the file, in a directory that is put in place later.
        items: its tensors, in any order; written in safetensors' own order.
        device: where the arithmetic runs.
        inputs: is shown every byte that is read.
        on_bytes: called with the number of bytes written, for a progress bar.
        compare: given everything as it was written and as the disk gives it back, meanwhile; None reads nothing back.
        stopwatch: told where the time goes.

    Returns:
        The file's digests. With `compare`, its sha256 is of the bytes that came back from the disk; without, of those
        sent to it.

    Raises:
        CheckpointError: an input ends early; a number is NaN or infinite. OSError: the disk is full. And what `compare`
            raises.
    """
    head, ordered = plan_file(item.spec for item in items)
    by_name = {item.spec.name: item for item in items}
    stream = _Stream([by_name[spec.name] for spec in ordered], device, inputs, on_bytes, stopwatch or Stopwatch())
    return stream.run(path, head, compare)


class _Stream:
    """The threads of one file. A queue's None means that nothing more comes; after a failure all queues get one.

    Buffers go round: free, read, merged, free. Their number bounds the memory.
    """

    def __init__(self, sequence: list[Item], device, inputs: InputDigests, on_bytes, stopwatch: Stopwatch) -> None:
        self._sequence, self._device, self._inputs = sequence, device, inputs
        self._on_bytes, self._stopwatch = on_bytes, stopwatch
        self._free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self._read: SimpleQueue[_Block | None] = SimpleQueue()
        self._merged: SimpleQueue[_Block | None] = SimpleQueue()
        self._failures: list[BaseException] = []
        self._tensors = {item.spec.name: xxhash.xxh3_128() for item in sequence}
        sizes = (_buffer_bytes(item, last - first) for item in sequence for first, last in blocks_of(item))
        size = max(sizes, default=0)
        for _ in range(_BUFFERS):
            self._free.put(torch.empty(size, dtype=torch.uint8))

    def run(self, path: Path, head: bytes, compare: Compare | None) -> FileDigests:
        digest = hashlib.sha256()
        with StreamedFile(path, compare and self._also_digested(compare, digest), self._stopwatch) as file:
            if compare is None:
                digest.update(head)
            file.append(memoryview(head))
            threads = [
                threading.Thread(target=self._guarded, args=work, daemon=True)
                for work in ((self._reader,), (self._writer, file, None if compare else digest))
            ]
            for thread in threads:
                thread.start()
            self._guarded(self._merger)
            for thread in threads:
                thread.join()
            if self._failures:
                raise self._failures[0]
            file.finish()
        tensors = {name: own.hexdigest() for name, own in self._tensors.items()}
        return FileDigests(digest.hexdigest(), hashlib.sha256(head).hexdigest(), tensors)

    def _also_digested(self, compare: Compare, digest: hashlib._Hash) -> Compare:
        """What comes back is what was sent, or `compare` raises; so one digest does for both."""

        def came_back(written: np.ndarray, read: np.ndarray) -> None:
            lap = self._stopwatch.of_thread()
            compare(written, read)
            lap("checking")
            digest.update(read.data)
            lap("digests of outputs")

        return came_back

    def _guarded(self, work: Callable, *args) -> None:
        try:
            work(*args)
        except BaseException as error:  # raised again by `run`, in the caller's thread
            self._failures.append(error)
            self._free.put(None)
            self._read.put(None)
            self._merged.put(None)

    def _reader(self) -> None:
        opened: dict[Path, int] = {}
        lap = self._stopwatch.of_thread()
        try:
            for item in self._sequence:
                entry = item.entry
                if entry.file not in opened:
                    opened[entry.file] = os.open(entry.file, os.O_RDONLY)
                for first, last in blocks_of(item):
                    if (buffer := self._free.get()) is None:
                        return
                    lap(None)
                    block = _Block(item, first, last, buffer, last - first)
                    view = block.data.data
                    _read_ahead(opened[entry.file], entry.start + last)
                    read_into(opened[entry.file], view, entry.start + first, entry.file)
                    lap("reading")
                    self._inputs.saw(entry.file, entry.start + first, view)
                    lap("digests of inputs")
                    self._read.put(block)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        self._read.put(None)

    def _merger(self) -> None:
        item, factors = None, []
        lap = self._stopwatch.of_thread()
        while (block := self._read.get()) is not None:
            lap(None)
            if block.item is not item:
                item, factors = block.item, [Factors.load(u, self._device) for u in block.item.updates]
            self._merged.put(_computed(block, factors, self._device))
            lap("arithmetic")
        self._merged.put(None)

    def _writer(self, file: StreamedFile, digest: hashlib._Hash | None) -> None:
        lap = self._stopwatch.of_thread()
        while (block := self._merged.get()) is not None:
            lap(None)
            data = block.data
            if not all_finite_bytes(data, block.item.spec.dtype):
                raise _not_finite(block)
            lap("looking for NaN")
            self._tensors[block.item.spec.name].update(data.data)
            if digest:
                digest.update(data.data)
            lap("digests of outputs")
            file.append(data.data)
            self._free.put(block.buffer)
            self._on_bytes(block.nbytes)


def _read_ahead(descriptor: int, start: int) -> None:
    """Ask for what comes next; by itself, the kernel would leave the disk idle while a block is digested."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, _READ_AHEAD, os.POSIX_FADV_WILLNEED)


def blocks_of(item: Item) -> Iterator[tuple[int, int]]:
    """The (first, last) bytes of each block of a tensor as it is stored: whole rows where something is added to it, and
    whole numbers elsewhere."""
    nbytes, itemsize, least = item.entry.nbytes, item.entry.itemsize, 1
    most = (
        _BLOCK_BYTES * itemsize // max(itemsize, DTYPES[item.spec.dtype].itemsize)
    )  # room for them once they are cast
    step = max(itemsize, most // itemsize * itemsize)
    if item.updates and nbytes:
        row = nbytes // item.entry.shape[0]
        step = row * max(_ROW_MULTIPLE, most // row // _ROW_MULTIPLE * _ROW_MULTIPLE)
        least = row * _ROW_MULTIPLE
    first = 0
    while first < nbytes:
        # What would be a last block of too few rows goes with the one before it.
        last = nbytes if nbytes - first - step < least else first + step
        yield first, last
        first = last


def _buffer_bytes(item: Item, nbytes: int) -> int:
    """Room for a block of so many stored bytes, before and after it is cast."""
    return max(nbytes, nbytes // item.entry.itemsize * DTYPES[item.spec.dtype].itemsize)


def _computed(block: _Block, factors: list[Factors], device: torch.device) -> _Block:
    """A block cast and with the updates added, where it lies."""
    spec, entry, nbytes = block.item.spec, block.item.entry, block.nbytes
    if spec.dtype != entry.dtype:
        nbytes = cast_in(block.buffer, nbytes, entry.dtype, spec.dtype)
    if factors:
        columns = spec.shape[1]
        rows = block.buffer[:nbytes].view(DTYPES[spec.dtype]).view(-1, columns)
        merge_rows(rows, block.first // (columns * entry.itemsize), factors, device)
    return replace(block, nbytes=nbytes)


def _not_finite(block: _Block) -> CheckpointError:
    """What to say of a block that came out with NaN or infinity; where they come from is looked up in its source."""
    spec, entry = block.item.spec, block.item.entry
    stored = torch.empty(_buffer_bytes(block.item, block.last - block.first), dtype=torch.uint8)
    nbytes = block.last - block.first
    with open(entry.file, "rb") as file:
        read_into(file.fileno(), stored[:nbytes].numpy().data, entry.start + block.first, entry.file)
    if not all_finite_bytes(stored[:nbytes].numpy(), entry.dtype):
        return CheckpointError(
            f"tensor {entry.stored_name} holds NaN or infinity", where=entry.file, mend="fetch or write it again"
        )
    nbytes = cast_in(stored, nbytes, entry.dtype, spec.dtype)
    if not all_finite_bytes(stored[:nbytes].numpy(), spec.dtype):
        return CheckpointError(
            f"tensor {entry.stored_name} holds numbers beyond the range of {spec.dtype}",
            where=entry.file,
            mend="choose another --output_dtype",
        )
    return CheckpointError(
        f"tensor {entry.stored_name} gets NaN or infinity by the merge, in {spec.dtype}",
        where=entry.file,
        mend="check the adapter's scaling, or choose another --output_dtype",
    )
