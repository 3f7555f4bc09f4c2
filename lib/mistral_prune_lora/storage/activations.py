"""Boundary activations on disk: the hidden states between two segments, written batch by batch.

A finished file is ordinary safetensors: the tensor "hidden_states", shape (windows, seqlen, hidden), in the compute
dtype, and "crc32", the CRC-32 of each window's bytes, which is checked whenever the window is read. Its metadata say
what was run, with a checksum too. Until it is complete it lies hidden beside its place, with a journal that names every
finished batch and its checksums. Whatever a kill or a power cut left is therefore known to be whole or not, without
waiting for the disk after every batch.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mistral_prune_lora.errors import CheckpointError, DataError, NumberError, PipelineError, printable
from mistral_prune_lora.provenance import record_text
from mistral_prune_lora.storage.dtypes import DTYPE_NAMES, DTYPES
from mistral_prune_lora.storage.finite import first_not_finite, mend_for
from mistral_prune_lora.storage.journal import Journal, open_own, remove_left, say_left_out
from mistral_prune_lora.storage.json_file import parsed
from mistral_prune_lora.storage.plain_file import lies_there
from mistral_prune_lora.storage.safetensors_file import (
    TensorSpec,
    plan_file,
    read_header,
    read_into,
    tensor_bytes,
)
from mistral_prune_lora.storage.space import require_space

_TENSOR, _SUMS = "hidden_states", "crc32"
_METADATA, _METADATA_SUM = "run", "run_crc32"
LESS_SPACE = "free space, take fewer windows, or work in a folder on another disk"
_AGAIN = "Delete it and run the same again"


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
            CheckpointError: it is not a file of boundary activations, is cut short, has no checksums (as those of
                former versions), or its metadata are not those that it was written with.
        """
        self.path = Path(path)
        entries = read_header(path)
        entry, sums = entries.get(_TENSOR), entries.get(_SUMS)
        if entry is None or len(entry.shape) != 3:
            raise CheckpointError("holds no boundary activations", where=path, mend="Run its segment again")
        if sums is None or (sums.dtype, sums.shape) != ("U32", entry.shape[:1]):
            raise CheckpointError("has no checksums of its windows", where=path, mend=_AGAIN)
        self.run = _sealed_run(path, entry.dtype, entry.shape)
        self.shape = entry.shape
        self.dtype = DTYPES[entry.dtype]
        self._entry, self._sums = entry, sums.read().numpy()

    def read(self, first: int, last: int) -> torch.Tensor:
        """The windows first..last-1 as a CPU tensor (last - first, seqlen, hidden).

        Raises:
            DataError: they are not the ones that were written there, or cannot be read.
        """
        if not 0 <= first < last <= self.shape[0]:
            raise ValueError(f"there are {self.shape[0]} windows, none {first}..{last - 1}")
        try:
            hidden = self._entry.read(slice(first, last))
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=self.path, mend="Run the same again") from None
        for window, found in enumerate(_checksums(hidden), first):
            if found != self._sums[window]:
                raise DataError(f"window {window} is not the one that was written", where=self.path, mend=_AGAIN)
        return hidden


def open_finished(path: Path, run: Mapping) -> ActivationReader | None:
    """The finished file of a run, to be used instead of running it once more; None if it is not there.

    One that cannot be believed, or is of another run, counts as not there; of the former this says so on stderr.
    """
    if not lies_there(path):
        return None
    try:
        reader = ActivationReader(path)
    except CheckpointError as error:
        print(f"warning: {printable(str(path))} {error.what}; it is made anew", file=sys.stderr)
        return None
    if reader.run != json.loads(record_text(run)):
        return None
    remove_left(_journal_of(path))  # of a run that was killed when this was in its place
    return reader


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
            PipelineError: the disk has not enough space, the place cannot be written to, or another process is writing
                this file.
        """
        self.path, self._shape, self._dtype, self._batch_size = Path(path), tuple(shape), dtype, batch_size
        spec = TensorSpec(_TENSOR, DTYPE_NAMES[dtype], self._shape)
        record = record_text(run)
        metadata = {_METADATA: record, _METADATA_SUM: _seal(record, spec.dtype, self._shape)}
        self._head, ordered = plan_file([spec, TensorSpec(_SUMS, "U32", self._shape[:1])], metadata)
        starts = np.cumsum([len(self._head), *(tensor.nbytes for tensor in ordered)])
        self._starts = {tensor.name: int(start) for tensor, start in zip(ordered, starts, strict=False)}
        self._window_bytes = spec.nbytes // self._shape[0]
        self._sums = np.zeros(self._shape[0], dtype="<u4")
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        header = {"run": record, "shape": self._shape, "dtype": spec.dtype, "batch_size": batch_size}
        self._journal = Journal(_journal_of(self.path), header)
        try:
            self._file = open_own(self._partial)
        except BaseException:
            self._journal.close()
            raise
        try:
            self.done: set[int] = set()
            refused = [entry for entry in self._journal.entries if not self._believe(entry)]
            if refused:
                say_left_out(self._journal.path, len(refused))
            if not self.done:
                self._journal.clear()
                os.truncate(self._file, 0)
            require_space({self.path: spec.nbytes - len(self.done) * batch_size * self._window_bytes}, mend=LESS_SPACE)
            self._put(memoryview(self._head), 0)
        except BaseException:
            self.close()
            raise

    @property
    def batches(self) -> int:
        """How many batches the windows make."""
        return -(-self._shape[0] // self._batch_size)

    def _windows(self, batch: int) -> slice:
        first = batch * self._batch_size
        return slice(first, min(first + self._batch_size, self._shape[0]))

    def _believe(self, entry: Mapping) -> bool:
        """Whether a journal's entry names a batch that there is, and its bytes are on disk; if so, it is done."""
        batch, sums = entry.get("batch"), entry.get(_SUMS)
        if type(batch) is not int or not 0 <= batch < self.batches or not isinstance(sums, list):
            return False
        windows = self._windows(batch)
        buffer = bytearray((windows.stop - windows.start) * self._window_bytes)
        try:
            read_into(self._file, memoryview(buffer), self._offset(windows.start), self._partial)
        except CheckpointError:
            return False
        hidden = torch.frombuffer(buffer, dtype=self._dtype).view(-1, *self._shape[1:])
        if sums != _checksums(hidden):
            return False
        self._sums[windows] = sums
        self.done.add(batch)
        return True

    def _offset(self, window: int) -> int:
        return self._starts[_TENSOR] + window * self._window_bytes

    def write(self, batch: int, hidden: torch.Tensor) -> None:
        """Write one batch, a CPU tensor (n, seqlen, hidden) in the file's dtype.

        Raises:
            NumberError: it holds NaN or infinity; nothing of it is kept.
            PipelineError: the disk is full or fails.
        """
        windows = self._windows(batch)
        expected = (windows.stop - windows.start, *self._shape[1:])
        if (tuple(hidden.shape), hidden.dtype) != (expected, self._dtype):
            raise ValueError(f"batch {batch} is {hidden.dtype} {tuple(hidden.shape)}, not {self._dtype} {expected}")
        fault = first_not_finite(hidden)
        if fault is not None:
            window = windows.start + fault
            raise NumberError(
                f"the hidden states of window {window} hold NaN or infinity",
                where=self.path,
                mend=mend_for(self._dtype),
                window=window,
            )
        sums = _checksums(hidden)
        self._put(tensor_bytes(hidden), self._offset(windows.start))
        self._journal.append({"batch": batch, _SUMS: sums})
        self._sums[windows] = sums
        self.done.add(batch)

    def _put(self, view: memoryview, offset: int) -> None:
        try:
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> PipelineError:
        return PipelineError(
            f"activations cannot be written: {error.strerror}",
            where=self.path,
            mend="Mend that and run the same again: finished batches are kept",
        )

    def finish(self) -> None:
        """Put the complete file in its place, fsynced.

        Raises:
            PipelineError: the disk is full or fails, or the file's place is taken by a directory.
        """
        if len(self.done) != self.batches:
            raise ValueError(f"{self.batches - len(self.done)} batches are missing")
        self._put(memoryview(self._sums.tobytes()), self._starts[_SUMS])
        try:
            os.fsync(self._file)
            os.replace(self._partial, self.path)
        except OSError as error:
            raise self._unwritten(error) from None
        self._journal.remove()

    def close(self) -> None:
        """Let go of the files; an unfinished one stays for the next run, unless nothing of it is there yet."""
        if not self.done:
            self._partial.unlink(missing_ok=True)
            self._journal.remove()
        os.close(self._file)
        self._journal.close()

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _journal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


def _checksums(hidden: torch.Tensor) -> list[int]:
    """The CRC-32 of the bytes of each window."""
    return [zlib.crc32(tensor_bytes(window)) for window in hidden]


def _seal(record: str, dtype: str, shape: Sequence[int]) -> str:
    """The checksum of what the header says: what was run, and how the bytes are to be taken."""
    return f"{zlib.crc32(record_text([record, dtype, list(shape)]).encode()):08x}"


def _sealed_run(path: str | Path, dtype: str, shape: Sequence[int]) -> dict:
    """The record in a file's metadata, once its checksum is found right."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        run = parsed(metadata[_METADATA])
        whole = metadata[_METADATA_SUM] == _seal(metadata[_METADATA], dtype, shape) and isinstance(run, dict)
    except (OSError, SafetensorError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError("does not say what was run, or not as it was written", where=path, mend=_AGAIN)
    return run
