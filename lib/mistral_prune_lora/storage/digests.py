"""Digests of weight files and of the tensors in them, remembered for as long as a file stays as it is."""

from __future__ import annotations

import hashlib
import threading
from functools import cache
from pathlib import Path

from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.safetensors_file import FileDigests, TensorEntry, read_header

_CHUNK_BYTES = 1 << 22
_one_at_a_time = threading.Lock()


def file_digest(path: Path) -> str:
    """The sha256 of a whole file."""
    state = path.stat()
    with _one_at_a_time:  # what several threads ask for is read once
        return _file_digest(path, state.st_mtime_ns, state.st_size)


def tensor_digest(entry: TensorEntry) -> str:
    """The sha256 of a tensor's bytes."""
    state = entry.file.stat()
    return _tensor_digest(entry, state.st_mtime_ns, state.st_size)


def header_digest(path: Path) -> str:
    """The sha256 of what stands before the tensors of a safetensors file; read each time, since it is small."""
    with open(path, "rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def weight_file_digests(path: Path) -> FileDigests:
    """All digests of a safetensors file, read once from beginning to end; CheckpointError if it is none."""
    entries = list(read_header(path).values())
    with open(path, "rb") as file:
        head = file.read(min((entry.start for entry in entries), default=path.stat().st_size))
        whole, tensors = hashlib.sha256(head), {}
        for entry in entries:  # one after the other, without gaps
            own, left = hashlib.sha256(), entry.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                whole.update(chunk)
                own.update(chunk)
                left -= len(chunk) or left
            tensors[entry.stored_name] = own.hexdigest()
    return FileDigests(whole.hexdigest(), hashlib.sha256(head).hexdigest(), tensors)


@cache
def _file_digest(path: Path, mtime: int, size: int) -> str:
    return file_sha256(path)


@cache
def _tensor_digest(entry: TensorEntry, mtime: int, size: int) -> str:
    digest = hashlib.sha256()
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        left = entry.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            digest.update(chunk)
            left -= len(chunk) or left
    return digest.hexdigest()
