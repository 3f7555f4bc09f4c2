"""Journals of finished work, by which a killed run goes on, or begins anew because it is another run.

A line is the CRC-32 of a JSON object in eight hex digits, a space, and that object, and is believed only as far as its
checksum goes. What a kill tore off, a disk changed or somebody edited is thereby known, counts as absent, and is said:
the work that it stood for is done again.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mistral_prune_lora.console import in_job
from mistral_prune_lora.errors import PipelineError, printable
from mistral_prune_lora.storage.json_file import parsed
from mistral_prune_lora.storage.scratch import NoLocks, locked

_LONGEST_LINE = 1 << 26  # bytes; a batch of half a million windows would have as many
_LOOK_AGAIN = 1.0  # seconds between two looks whether another process has ended
_ELSEWHERE = "Move it away, or work in another folder"


class Journal:
    """Finished work of runs with an equal header, held by one process at a time.

    Attributes:
        path: the file.
        entries: what former runs with an equal header have appended, and this one.
    """

    def __init__(self, path: Path, header: Mapping) -> None:
        """Open it and hold it until `close`; one of another header is begun anew.

        Raises:
            PipelineError: another process holds it, or it cannot be opened or written.
        """
        self.path, self._header = path, json.loads(json.dumps(dict(header)))
        self._file = open_held(path, "another process is computing this right now")
        try:
            self.entries, lost = self._read()
            if lost is None:
                self.clear()
            elif lost:
                # Written anew, so that what is appended never follows a torn line.
                say_left_out(path, lost)
                kept = self.entries
                self.clear()
                for entry in kept:
                    self.append(entry)
        except BaseException:
            os.close(self._file)
            raise

    def _read(self) -> tuple[list[dict], int | None]:
        """The entries, and how many lines are none; None instead of a count if the header is another one."""
        with open(self._file, "rb", closefd=False) as file:
            if _entry(file.readline(_LONGEST_LINE)) != self._header:
                return [], None
            entries, lost = [], 0
            while line := file.readline(_LONGEST_LINE):
                entry = _entry(line)
                if entry is None:
                    lost += 1
                else:
                    entries.append(entry)
        return entries, lost

    def clear(self) -> None:
        """Forget all entries.

        Raises:
            PipelineError: the disk is full or fails.
        """
        self.entries = []
        os.ftruncate(self._file, 0)
        self._write(self._header)

    def append(self, entry: Mapping) -> None:
        """Add an entry, JSON-serialisable and without NaN or infinity; it survives the death of this process.

        Raises:
            PipelineError: the disk is full or fails.
        """
        self._write(entry)
        self.entries.append(dict(entry))

    def _write(self, content: Mapping) -> None:
        text = json.dumps(content, allow_nan=False).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        try:
            os.lseek(self._file, 0, os.SEEK_END)
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise PipelineError(
                f"cannot be written: {error.strerror}", where=self.path, mend="Mend that and run the same again"
            ) from None

    def remove(self) -> None:
        """Delete the file: the work is complete."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_own(path: Path) -> int:
    """Open a file of unfinished work, made if it is not there, for reading and writing; returns its descriptor.

    Never through a link, and never a pipe or device: what is written there would go to somebody else.

    Raises:
        PipelineError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise PipelineError(f"cannot be opened: {error.strerror}", where=path, mend=_ELSEWHERE) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PipelineError("is not a regular file", where=path, mend=_ELSEWHERE)
    return descriptor


def open_held(path: Path, told: str, *, where: Path | None = None) -> int:
    """Open a file of unfinished work as `open_own` does and hold it, where the file system knows locks.

    A job of the workflow waits for another process that holds it, and says so: Snakemake lets no two run at once, so it
    is a job that lives on after its main process was killed.

    Args:
        path: the file.
        told: what is said where another process holds it.
        where: what is named then; None names the file.

    Raises:
        PipelineError: another process holds it, or it cannot be opened.
    """
    said = False
    while True:
        descriptor = open_own(path)
        try:
            free = locked(descriptor)
        except NoLocks:
            return descriptor
        if not free:
            os.close(descriptor)
            if in_job():
                if not said:
                    print(f"{printable(str(where or path))}: {told}: waiting for it", file=sys.stderr, flush=True)
                said = True
                time.sleep(_LOOK_AGAIN)
                continue
            raise PipelineError(told, where=where or path, mend="Wait for it, or end it")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # finished and removed by another process between the two steps


def remove_left(path: Path) -> None:
    """Delete a journal that a killed process left beside its finished work, unless another process holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # as a rule, since there is none
        return
    try:
        ours = stat.S_ISREG(os.fstat(descriptor).st_mode)
        with suppress(NoLocks):
            ours = ours and locked(descriptor)
        if ours:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


def say_left_out(path: Path, count: int) -> None:
    """Say on stderr that entries of a journal are not believed."""
    told = f"{count} of its entries are not what was written there" if count > 1 else "an entry is not what was written"
    print(f"warning: {printable(str(path))}: {told}; that work is done again", file=sys.stderr)


def _entry(line: bytes) -> dict | None:
    """The object in a whole line of the right checksum; None for anything else."""
    told, _, text = line.removesuffix(b"\n").partition(b" ")
    try:
        if not line.endswith(b"\n") or told != b"%08x" % zlib.crc32(text):
            return None
        content = parsed(text.decode("utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
