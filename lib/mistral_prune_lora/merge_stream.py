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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from mistral_prune_lora.adapter import Update
from mistral_prune_lora.digest import file_sha256
from mistral_prune_lora.merge_plan import Item
from mistral_prune_lora.safetensors_file import DTYPES, plan_file, read_into
from mistral_prune_lora.streamed_file import StreamedFile

_BLOCK_BYTES = 2 << 20
# MKL computes products of 1 to 3 rows, and odd rows at the end of a block, by other kernels with other rounding. Blocks
# of a multiple of 64 rows, the last of at least 64, were found to give the bits of the whole product for every shape.
_ROW_MULTIPLE = 64
_BUFFERS = 12
_READ_AHEAD = 16 << 20
_HEAD_BYTES = 128 << 20  # of a file's start that was not read, what is fetched for the sake of its digest


@dataclass(frozen=True)
class _Block:
    """Some rows of one tensor, or some bytes of an untouched one."""

    item: Item
    start: int  # first byte within the tensor
    buffer: torch.Tensor  # uint8, the buffer that it lies in
    nbytes: int

    @property
    def data(self) -> torch.Tensor:
        return self.buffer[: self.nbytes]


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
    on_bytes: Callable[[int], None],
) -> str:
    """Write one output file; returns its sha256. Call it within `exact_arithmetic`.

    Args:
        path: the file, in a directory that is put in place later.
        items: its tensors, in any order; written in safetensors' own order.
        device: where the arithmetic runs.
        inputs: is shown every byte that is read.
        on_bytes: called with the number of bytes written, for a progress bar.

    Raises:
        CheckpointError: an input ends early. OSError: the disk is full.
    """
    head, ordered = plan_file(item.spec for item in items)
    by_name = {item.spec.name: item for item in items}
    stream = _Stream([by_name[spec.name] for spec in ordered], device, inputs, on_bytes)
    with StreamedFile(path) as file:
        return stream.run(file, head)


class _Stream:
    """The threads of one file. A queue's None means that nothing more comes; after a failure all queues get one.

    Buffers go round: free, read, merged, free. Their number bounds the memory.
    """

    def __init__(self, sequence: list[Item], device: torch.device, inputs: InputDigests, on_bytes) -> None:
        self._sequence, self._device, self._inputs, self._on_bytes = sequence, device, inputs, on_bytes
        self._free, self._read, self._merged = (SimpleQueue() for _ in range(3))
        self._failures: list[BaseException] = []
        size = max((last - first for item in sequence for first, last in blocks_of(item)), default=0)
        for _ in range(_BUFFERS):
            self._free.put(torch.empty(size, dtype=torch.uint8))

    def run(self, file: StreamedFile, head: bytes) -> str:
        digest = hashlib.sha256(head)
        file.append(memoryview(head))
        threads = [
            threading.Thread(target=self._guarded, args=work, daemon=True)
            for work in ((self._reader,), (self._writer, file, digest))
        ]
        for thread in threads:
            thread.start()
        self._guarded(self._merger)
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]
        file.finish()
        return digest.hexdigest()

    def _guarded(self, work: Callable, *args) -> None:
        try:
            work(*args)
        except BaseException as error:  # raised again by `run`, in the caller's thread
            self._failures.append(error)
            for queue in (self._free, self._read, self._merged):
                queue.put(None)

    def _reader(self) -> None:
        opened: dict[Path, int] = {}
        try:
            for item in self._sequence:
                entry = item.entry
                if entry.file not in opened:
                    opened[entry.file] = os.open(entry.file, os.O_RDONLY)
                for first, last in blocks_of(item):
                    if (buffer := self._free.get()) is None:
                        return
                    block = _Block(item, first, buffer, last - first)
                    view = memoryview(block.data.numpy())
                    _read_ahead(opened[entry.file], entry.start + last)
                    read_into(opened[entry.file], view, entry.start + first, entry.file)
                    self._inputs.saw(entry.file, entry.start + first, view)
                    self._read.put(block)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        self._read.put(None)

    def _merger(self) -> None:
        item, factors = None, []
        while (block := self._read.get()) is not None:
            if block.item.updates:
                if block.item is not item:
                    item, factors = block.item, [Factors.load(u, self._device) for u in block.item.updates]
                _merge_block(block, factors, self._device)
            self._merged.put(block)
        self._merged.put(None)

    def _writer(self, file: StreamedFile, digest) -> None:
        while (block := self._merged.get()) is not None:
            view = memoryview(block.data.numpy())
            digest.update(view)
            file.append(view)
            self._free.put(block.buffer)
            self._on_bytes(block.nbytes)


def _read_ahead(descriptor: int, start: int) -> None:
    """Ask for what comes next; by itself, the kernel would leave the disk idle while a block is digested."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, _READ_AHEAD, os.POSIX_FADV_WILLNEED)


def blocks_of(item: Item) -> Iterator[tuple[int, int]]:
    """The (first, last) bytes of each block of a tensor: whole rows where something is added to it."""
    nbytes, step, least = item.entry.nbytes, _BLOCK_BYTES, 1
    if item.updates and nbytes:
        row = nbytes // item.entry.shape[0]
        step = row * max(_ROW_MULTIPLE, _BLOCK_BYTES // row // _ROW_MULTIPLE * _ROW_MULTIPLE)
        least = row * _ROW_MULTIPLE
    first = 0
    while first < nbytes:
        # What would be a last block of too few rows goes with the one before it.
        last = nbytes if nbytes - first - step < least else first + step
        yield first, last
        first = last


def _merge_block(block: _Block, factors: list[Factors], device: torch.device) -> None:
    """Add the updates to a block where it lies."""
    columns = block.item.spec.shape[1]
    here = block.data.view(DTYPES[block.item.spec.dtype]).view(-1, columns)
    first = block.start // (columns * here.element_size())
    weight = here.to(device)
    for update in factors:
        weight = update.add_to(weight, slice(first, first + len(weight)))
    if weight is not here:
        here.copy_(weight)


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
