"""A large file written from beginning to end, beside whatever else the process does."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path
from queue import SimpleQueue

import numpy as np

_ALIGNMENT = 4096  # of addresses, offsets and sizes in direct writes: a multiple of every common device's block
_BUFFER_BYTES = 4 << 20
_BUFFERS = 4
_SYNC_EVERY = 64 << 20


class StreamedFile:
    """A new file that bytes are appended to; a thread of its own writes them.

    Where the file system can, writes are direct: they spare the copy into the page cache and its write-back, which cost
    a merge as much time as its arithmetic, and leave nothing for a long fsync at the end. Elsewhere they are plain,
    with a sync now and then. Errors of the thread are raised by the next `append` or by `finish`.

    Use it as a context manager; without `finish` the file's content is undefined.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor, self._direct = _open(path)
        self._free, self._full = SimpleQueue(), SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(np.frombuffer(mmap.mmap(-1, _BUFFER_BYTES), dtype=np.uint8))  # mmap: aligned to pages
        self._buffer, self._filled = self._free.get(), 0
        self._size = self._written = self._unsynced = 0
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._flush, daemon=True)
        self._thread.start()

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(self, *exception) -> None:
        self._end_thread()
        os.close(self._descriptor)

    def append(self, data: memoryview) -> None:
        """Add bytes; they may be changed again as soon as this returns.

        Raises:
            OSError: earlier bytes could not be written, for example because the disk is full.
        """
        rest = np.frombuffer(data, dtype=np.uint8)
        self._size += len(rest)
        while len(rest):
            count = min(len(rest), _BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]  # numpy lets other threads run meanwhile
            self._filled += count
            rest = rest[count:]
            if self._filled == _BUFFER_BYTES:
                self._full.put((self._buffer, self._filled))
                self._buffer, self._filled = self._free.get(), 0
                self._raise_failure()

    def finish(self) -> None:
        """Write what is left and wait until the disk has everything.

        Raises:
            OSError: as for `append`.
        """
        self._full.put((self._buffer, self._filled))
        self._end_thread()
        self._raise_failure()
        os.ftruncate(self._descriptor, self._size)  # the last direct write was padded
        os.fsync(self._descriptor)

    def _end_thread(self) -> None:
        self._full.put(None)
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _flush(self) -> None:
        while (work := self._full.get()) is not None:
            buffer, count = work
            if self._failure is None:
                try:
                    self._write(buffer, count)
                except OSError as error:
                    self._failure = error
            self._free.put(buffer)

    def _write(self, buffer: np.ndarray, count: int) -> None:
        done = 0
        while done < count:
            end = -(-count // _ALIGNMENT) * _ALIGNMENT if self._direct else count
            try:
                done += os.pwrite(self._descriptor, memoryview(buffer)[done:end], self._written + done)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                # A device of larger blocks, or a file system that only seemed to know direct writes.
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self._direct = False
        self._written += count
        self._unsynced += count
        if not self._direct and self._unsynced >= _SYNC_EVERY:
            os.fdatasync(self._descriptor)
            self._unsynced = 0


def _open(path: Path) -> tuple[int, bool]:
    """(a descriptor of a new file, whether it writes directly)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666), hasattr(os, "O_DIRECT")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666), False
