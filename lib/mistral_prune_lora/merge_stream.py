"""The merge as a stream: one thread reads, this one computes, one writes and digests, one keeps the disk busy.

Only a few blocks of rows are in memory at a time. A block is small enough that its float32 delta stays in the cache,
which is what makes this several times as fast as whole matrices, and large enough that matrix products keep the kernel,
and so the bits, that they have for the whole matrix.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mistral_prune_lora.adapter import Update
from mistral_prune_lora.merge_plan import Item
from mistral_prune_lora.safetensors_file import DTYPES, plan_file, read_into

_BLOCK_BYTES = 4 << 20
_MIN_ROWS = 64  # a product of fewer rows may be computed by another kernel, with other rounding
_BLOCKS_AHEAD = 4
_SYNC_EVERY = 256 << 20


@dataclass
class _Block:
    """Some rows of one tensor, or some bytes of an untouched one."""

    item: Item
    start: int  # first byte within the tensor
    data: torch.Tensor  # uint8


class InputDigests:
    """The sha256 of input files, taken from the bytes as they pass; a file that was not read straight through is read
    again at the end."""

    def __init__(self) -> None:
        self._running: dict[Path, tuple[hashlib._Hash, int] | None] = {}

    def saw(self, path: Path, start: int, data: memoryview) -> None:
        """Take note of bytes that were read at an offset."""
        if path not in self._running:
            with open(path, "rb") as file:
                head = file.read(start) if start < 1 << 27 else b""
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
        if state and state[1] == path.stat().st_size:
            return state[0].hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def stream_file(
    path: Path,
    items: list[Item],
    *,
    device: torch.device,
    inputs: InputDigests,
    on_bytes: Callable[[int], None],
) -> str:
    """Write one output file; returns its sha256.

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
    sequence = [by_name[spec.name] for spec in ordered]
    read, merged, dirty = queue.Queue(_BLOCKS_AHEAD), queue.Queue(_BLOCKS_AHEAD), queue.Queue()
    digest = hashlib.sha256(head)
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None], *outputs: queue.Queue) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # handed to the caller's thread
                failures.append(error)
                stop.set()
            finally:
                for output in outputs:
                    _put(output, None, stop)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    with open(path, "wb", buffering=0) as file:
        file.write(head)

        def reader() -> None:
            for block in _read_blocks(sequence, inputs):
                _put(read, block, stop)

        def writer() -> None:
            unsynced = 0
            while (block := _get(merged, stop)) is not None:
                view = memoryview(block.numpy())
                digest.update(view)
                done = 0
                while done < len(view):
                    done += file.write(view[done:])
                on_bytes(len(view))
                unsynced += len(view)
                if unsynced >= _SYNC_EVERY:
                    dirty.put(True)
                    unsynced = 0

        def syncer() -> None:
            # Early and beside the rest: a final fsync of everything would be as long as the merge itself.
            while dirty.get() is not None:
                os.fdatasync(file.fileno())

        threads = [guarded(reader, read), guarded(writer, dirty), guarded(syncer)]
        try:
            merger = _Merger(device)
            while (block := _get(read, stop)) is not None:
                _put(merged, merger.apply(block), stop)
        except BaseException as error:
            failures.append(error)
            stop.set()
        _put(merged, None, stop)
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _put(target: queue.Queue, thing, stop: threading.Event) -> None:
    while True:
        try:
            target.put(thing, timeout=0.2)
            return
        except queue.Full:
            if stop.is_set():
                return


def _get(source: queue.Queue, stop: threading.Event):
    while True:
        try:
            return source.get(timeout=0.2)
        except queue.Empty:
            if stop.is_set():
                return None


def _read_blocks(sequence: list[Item], inputs: InputDigests) -> Iterator[_Block]:
    opened: dict[Path, int] = {}
    try:
        for item in sequence:
            entry = item.entry
            if entry.file not in opened:
                opened[entry.file] = os.open(entry.file, os.O_RDONLY)
            size = block_bytes(item)
            for start in range(0, max(entry.nbytes, 1), size):
                data = torch.empty(min(size, entry.nbytes - start), dtype=torch.uint8)
                view = memoryview(data.numpy())
                read_into(opened[entry.file], view, entry.start + start, entry.file)
                inputs.saw(entry.file, entry.start + start, view)
                yield _Block(item, start, data)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def block_bytes(item: Item) -> int:
    """How much of a tensor is handled at once: whole rows where something is added to it."""
    if not item.updates:
        return _BLOCK_BYTES
    row = item.entry.nbytes // item.entry.shape[0]
    rows = max(_MIN_ROWS, _BLOCK_BYTES // row // _MIN_ROWS * _MIN_ROWS)
    # A short last block would be such a product of few rows: better one block that is a little longer.
    whole = item.entry.shape[0]
    return row * (rows if whole % rows == 0 or whole % rows >= _MIN_ROWS else whole)


class _Merger:
    """Adds updates to blocks; keeps the factors of the tensor at hand."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._item, self._factors = device, None, []

    def apply(self, block: _Block) -> torch.Tensor:
        """The block's bytes with its updates added, as uint8."""
        item = block.item
        if not item.updates:
            return block.data
        if item is not self._item:
            self._item, self._factors = item, [Factors.load(u, self._device) for u in item.updates]
        columns = item.spec.shape[1]
        weight = block.data.view(DTYPES[item.spec.dtype]).view(-1, columns).to(self._device)
        first = block.start // (columns * weight.element_size())
        for factors in self._factors:
            weight = factors.add_to(weight, slice(first, first + len(weight)))
        return weight.cpu().contiguous().view(-1).view(torch.uint8)


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
        magnitude = update.magnitude and update.magnitude.read().float().view(-1).to(device)
        return cls(update.a.read().float().to(device), update.b.read().float().to(device), magnitude, update.scaling)

    def add_to(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """The rows of a weight with this update merged, in the weight's dtype; may reuse its memory.

        LoRA: W + (B A) s, rounded once (https://arxiv.org/abs/2106.09685, section 4.1). DoRA: m / |W + (B A) s| times
        that, with the norm over each row in float32 (https://arxiv.org/abs/2402.09353, equation 5).
        """
        delta = (self.b[rows] @ self.a) * self.scaling
        if self.magnitude is None:
            return weight.add_(delta)
        summed = weight + delta
        norm = torch.linalg.norm(summed, dim=1)
        return ((self.magnitude[rows] / norm).view(-1, 1) * summed).to(weight.dtype)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """One thread for torch, so that results do not depend on how many there are, and no TF32 on a GPU."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32
