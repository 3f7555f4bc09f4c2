"""A large file written from beginning to end, beside whatever else the process does."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from mistral_prune_lora.storage.read_back import (
    ALIGNMENT,
    Compare,
    ReadBack,
    aligned_buffer,
    open_direct,
    without_direct,
)
from mistral_prune_lora.storage.stopwatch import Stopwatch

_BUFFER_BYTES = 4 << 20
_BUFFERS = 4
_SYNC_EVERY = 64 << 20
# What is compared with the disk is kept until it has come back: so many buffers more, and syncs after fewer of them.
_BUFFERS_BEHIND = 8
_SYNC_EVERY_BEHIND = 16 << 20


class StreamedFile:
    """A new file that bytes are appended to; a thread of its own writes them.

    Where the file system can, writes are direct: they spare the copy into the page cache and its write-back, which cost
    a merge as much time as its arithmetic, and leave nothing for a long fsync at the end. Elsewhere they are plain,
    with a sync now and then. Errors of the thread are raised by the next `append` or by `finish`.

    With `compare`, everything is also read back from the disk, a few buffers behind the writer, and given to it beside
    what was written (see `read_back.ReadBack`). What it raises ends the writing as an error of the disk does.

    Use it as a context manager; without `finish` the file's content is undefined.
    """

    def __init__(self, path: Path, compare: Compare | None = None, stopwatch: Stopwatch | None = None) -> None:
        self._stopwatch = stopwatch or Stopwatch()
        self._descriptor, self._direct = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        self._full: SimpleQueue[np.ndarray | None] = SimpleQueue()
        for _ in range(_BUFFERS + (_BUFFERS_BEHIND if compare else 0)):
            self._free.put(aligned_buffer(_BUFFER_BYTES))
        self._buffer, self._filled = self._free.get(), 0
        self._written = self._synced = 0
        self._sync_every = _SYNC_EVERY_BEHIND if compare else _SYNC_EVERY
        self._waiting: list[tuple[np.ndarray, int, int]] = []  # (buffer, bytes, offset): written, perhaps not synced
        self._failure: OSError | None = None
        self._back = ReadBack(path, _BUFFER_BYTES, compare, self._free.put, self._stopwatch) if compare else None
        self._thread = threading.Thread(target=self._flush, daemon=True)
        self._thread.start()

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(self, *exception) -> None:
        self._end_writer()
        if self._back:
            self._back.close()
        os.close(self._descriptor)

    def append(self, data: memoryview) -> None:
        """Add bytes; they may be changed again as soon as this returns.

        Raises:
            OSError: earlier bytes could not be written, for example because the disk is full.
        """
        rest = np.frombuffer(data, dtype=np.uint8)
        while len(rest):
            count = min(len(rest), _BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]  # numpy lets other threads run meanwhile
            self._filled += count
            rest = rest[count:]
            if self._filled == _BUFFER_BYTES:
                self._full.put(self._buffer)
                self._buffer, self._filled = self._free.get(), 0
                self._raise_failure()

    def finish(self) -> None:
        """Write what is left and wait until the disk has everything and all of it was compared.

        Raises:
            OSError: as for `append`.
        """
        self._end_writer()
        self._raise_failure()
        lap = self._stopwatch.of_thread()
        self._write(self._buffer, self._filled)
        os.ftruncate(self._descriptor, self._written)  # the last direct write was padded
        os.fsync(self._descriptor)
        lap("writing")
        self._let_go()
        if self._back:
            self._back.wait()
            self._raise_failure()

    def _end_writer(self) -> None:
        self._full.put(None)
        self._thread.join()

    def _raise_failure(self) -> None:
        if failure := self._failure or (self._back and self._back.failure):
            raise failure

    def _flush(self) -> None:
        lap = self._stopwatch.of_thread()
        while (buffer := self._full.get()) is not None:
            lap(None)
            if self._failure:
                self._free.put(buffer)
                continue
            try:
                self._write(buffer, _BUFFER_BYTES)
                self._sync_now_and_then()
            except OSError as error:
                self._failure = error
            lap("writing")
            if self._failure or not self._back or self._direct or self._synced == self._written:
                self._let_go()

    def _let_go(self) -> None:
        """Give what was written to who reads it back, or else to who fills it again."""
        for buffer, count, offset in self._waiting:
            if self._back and not self._failure:
                self._back.follow(buffer, count, offset)
            else:
                self._free.put(buffer)
        self._waiting.clear()

    def _write(self, buffer: np.ndarray, count: int) -> None:
        self._waiting.append((buffer, count, self._written))
        done = 0
        while done < count:
            end = -(-count // ALIGNMENT) * ALIGNMENT if self._direct else count
            try:
                done += os.pwrite(self._descriptor, buffer.data[done:end], self._written + done)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                # A device of larger blocks, or a file system that only seemed to know direct writes.
                without_direct(self._descriptor)
                self._direct = False
        self._written += count

    def _sync_now_and_then(self) -> None:
        if not self._direct and self._written - self._synced >= self._sync_every:
            os.fdatasync(self._descriptor)
            self._synced = self._written
