"""A file that is being written, read back from the disk behind the writer."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.storage.stopwatch import Stopwatch

ALIGNMENT = 4096  # of addresses, offsets and sizes in direct transfers: a multiple of every common device's block
_BUFFERS = 3

# What is done with what came back: given the bytes as they were written, and as they came back, both uint8.
Compare = Callable[[np.ndarray, np.ndarray], None]


def aligned_buffer(nbytes: int) -> np.ndarray:
    """Fresh memory for direct transfers, as uint8."""
    return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)  # mmap: aligned to pages


def without_direct(descriptor: int) -> None:
    """From here on let transfers of an open file go through the page cache."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """(a descriptor of a file, whether its transfers pass the page cache by)."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666), hasattr(os, "O_DIRECT")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666), False


class ReadBack:
    """Two threads that follow a writer: one reads what the disk has, one compares it with what was written.

    Where the file system can, reads are direct: they take nothing from the page cache, so that what comes back was sent
    by the device. Elsewhere the pages are dropped from the cache first, which they can be once they were synced. From
    where the device takes it, its own cache or its medium, no reader can tell.

    Every buffer given to `follow` must stay as it is until it comes out of `done`.
    """

    def __init__(
        self, path: Path, buffer_bytes: int, compare: Compare, done: Callable[[np.ndarray], None], stopwatch: Stopwatch
    ) -> None:
        """Start; `compare` and `done` are called on one thread, in the order of the file."""
        self._path, self._compare, self._done, self._stopwatch = path, compare, done, stopwatch
        self._descriptor, self._direct = open_direct(path, os.O_RDONLY)
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        self._written: SimpleQueue[tuple[np.ndarray, int, int] | None] = SimpleQueue()
        self._read: SimpleQueue[tuple[np.ndarray, np.ndarray, int] | None] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(aligned_buffer(buffer_bytes))
        self.failure: BaseException | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._reader, self._comparer)]
        for thread in self._threads:
            thread.start()

    def follow(self, buffer: np.ndarray, count: int, offset: int) -> None:
        """Read `count` bytes at `offset` again: the start of `buffer` was written there, directly or with a sync."""
        self._written.put((buffer, count, offset))

    def wait(self) -> None:
        """Wait until everything is compared; then `failure` says what went wrong. Nothing may follow any more."""
        self._written.put(None)
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Wait, and close the file."""
        self.wait()
        os.close(self._descriptor)

    def _reader(self) -> None:
        lap = self._stopwatch.of_thread()
        while (work := self._written.get()) is not None:
            buffer, count, offset = work
            came_back = self._free.get()
            lap(None)
            if self.failure is None:
                try:
                    self._fill(came_back, count, offset)
                except BaseException as error:  # raised again by the writer, in its caller's thread
                    self.failure = error
            lap("reading back")
            self._read.put((buffer, came_back, count))
        self._read.put(None)

    def _comparer(self) -> None:
        while (work := self._read.get()) is not None:
            buffer, came_back, count = work
            if self.failure is None:
                try:
                    self._compare(buffer[:count], came_back[:count])
                except BaseException as error:
                    self.failure = error
            self._free.put(came_back)
            self._done(buffer)

    def _fill(self, buffer: np.ndarray, count: int, offset: int) -> None:
        done = 0
        padded = -(-count // ALIGNMENT) * ALIGNMENT
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, padded, os.POSIX_FADV_DONTNEED)
        while done < count:
            try:
                got = os.preadv(self._descriptor, [buffer.data[done:padded]], offset + done)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                without_direct(self._descriptor)
                self._direct = False
                self._fill(buffer, count, offset)
                return
            if got == 0:
                raise CheckpointError("ends before what was written to it", where=self._path, mend="check the disk")
            done += got
