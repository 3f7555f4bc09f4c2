"""Boundary activations on disk: the hidden states between two segments, written batch by batch.

A finished file is ordinary safetensors with one tensor "hidden_states", shape (windows, seqlen, hidden), in the compute
dtype; its metadata say what was run. Until it is complete it lies hidden beside its place, with a journal that names
every finished batch and the CRC-32 of its bytes. Whatever a kill or a power cut left is therefore known to be whole or
not, without waiting for the disk after every batch.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.safetensors_file import (
    DTYPE_NAMES,
    TensorSpec,
    plan_file,
    read_header,
    read_into,
    tensor_bytes,
)
from mistral_prune_lora.transaction import nearest_directory

_TENSOR = "hidden_states"
_METADATA = "run"


class ActivationReader:
    """Hidden states of a finished file, read by position; what is not asked for is not in memory.

    Attributes:
        run: the record of what was run, as given to the writer.
        shape: (windows, seqlen, hidden).
        dtype: of the hidden states.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a finished file.

        Raises:
            CheckpointError: it is not a file of boundary activations, or is cut short.
        """
        self._entry = read_header(path).get(_TENSOR)
        if self._entry is None:
            raise CheckpointError("holds no boundary activations", where=path, mend="Run its segment again")
        with safe_open(path, "pt") as file:
            self.run = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        self.path, self.shape = Path(path), self._entry.shape
        self.dtype = next(dtype for dtype, name in DTYPE_NAMES.items() if name == self._entry.dtype)

    def read(self, first: int, last: int) -> torch.Tensor:
        """The windows first..last-1 as a CPU tensor (last - first, seqlen, hidden)."""
        return self._entry.read(slice(first, last))


class ActivationWriter:
    """Writes hidden states batch by batch; knows which batches a killed run has finished.

    Attributes:
        done: the numbers of the batches that are there already.
    """

    def __init__(
        self, path: str | Path, shape: tuple[int, int, int], dtype: torch.dtype, batch_size: int, run: Mapping
    ) -> None:
        """Start, or go on where a run with an equal record stopped; the remains of any other run are thrown away.

        Args:
            path: where the finished file goes.
            shape: (windows, seqlen, hidden).
            dtype: of the hidden states.
            batch_size: windows in a batch; the last batch may be smaller.
            run: JSON-serialisable, names everything that the content depends on; kept in the file.

        Raises:
            PipelineError: the disk has not enough space, or another process is writing this file.
        """
        self.path, self._shape, self._batch_size = Path(path), shape, batch_size
        spec = TensorSpec(_TENSOR, DTYPE_NAMES[dtype], shape)
        record = json.dumps(dict(run), sort_keys=True)
        self._head, _ = plan_file([spec], {_METADATA: record})
        self._window_bytes = spec.nbytes // shape[0]
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.path.with_name(f".{self.path.name}.journal"), {"run": record, "shape": shape})
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self.done = {e["batch"] for e in self._journal.entries if self._is_whole(e["batch"], e["crc32"])}
            if not self.done:
                self._journal.clear()
                os.truncate(self._file, 0)
            require_space(self.path.parent, spec.nbytes - len(self.done) * batch_size * self._window_bytes)
            os.pwrite(self._file, self._head, 0)
        except BaseException:
            self.close()
            raise

    def _span(self, batch: int) -> tuple[int, int]:
        """Offset and length in bytes of a batch."""
        first = batch * self._batch_size
        count = min(self._batch_size, self._shape[0] - first)
        return len(self._head) + first * self._window_bytes, count * self._window_bytes

    def _is_whole(self, batch: int, crc32: int) -> bool:
        start, length = self._span(batch)
        buffer = bytearray(length)
        try:
            read_into(self._file, memoryview(buffer), start, self._partial)
        except CheckpointError:
            return False
        return zlib.crc32(buffer) == crc32

    def write(self, batch: int, hidden: torch.Tensor) -> None:
        """Write one batch, a CPU tensor (n, seqlen, hidden) in the file's dtype.

        Raises:
            PipelineError: the disk is full or fails.
        """
        view, (offset, _) = tensor_bytes(hidden), self._span(batch)
        crc32 = zlib.crc32(view)
        try:
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written
            self._journal.append({"batch": batch, "crc32": crc32})
        except OSError as error:
            raise PipelineError(
                f"activations cannot be written: {error.strerror}",
                where=self.path,
                mend="Mend that and run the same again: finished batches are kept",
            ) from None
        self.done.add(batch)

    def finish(self) -> None:
        """Put the complete file in its place, fsynced."""
        os.fsync(self._file)
        os.replace(self._partial, self.path)
        self._journal.remove()

    def close(self) -> None:
        """Let go of the files; an unfinished one stays for the next run."""
        os.close(self._file)
        self._journal.close()

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Journal:
    """A file of JSON lines that names finished work; a torn last line, or another header, counts as absent.

    Attributes:
        entries: what former runs with an equal header have appended.
    """

    def __init__(self, path: Path, header: Mapping) -> None:
        """Open it and hold it until `close`.

        Raises:
            PipelineError: another process holds it.
        """
        self._path, self._header = path, json.loads(json.dumps(dict(header)))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (held open on purpose: it carries the lock)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise PipelineError(
                "another process is computing this right now", where=path, mend="Wait for it, or end it"
            ) from None
        self._file.seek(0)
        header_line, *lines = self._file.read().split("\n")
        same = _parsed(header_line) == self._header
        self.entries = [e for e in map(_parsed, lines) if e is not None] if same else []
        # Rewritten, so that what is appended never follows a torn line.
        kept = list(self.entries)
        self.clear()
        for entry in kept:
            self.append(entry)

    def clear(self) -> None:
        """Forget all entries."""
        self._file.truncate(0)
        self.entries = []
        self._line(self._header)

    def append(self, entry: Mapping) -> None:
        """Add an entry; it survives the death of this process."""
        self.entries.append(dict(entry))
        self._line(entry)

    def _line(self, entry: Mapping) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Delete the file: the work is complete."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def require_space(folder: Path, nbytes: int) -> None:
    """Raise a PipelineError if the file system of a folder, which need not exist yet, has not `nbytes` free."""
    free = shutil.disk_usage(nearest_directory(folder)).free
    if nbytes > free:
        raise PipelineError(
            f"{nbytes / 1e6:.1f} MB of activations do not fit: {free / 1e6:.1f} MB are free",
            where=folder,
            mend="Free space, take fewer windows, or work in a folder on another disk",
        )
