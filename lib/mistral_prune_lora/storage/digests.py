"""Digests of weight files and of the tensors in them, remembered for as long as a file stays as it is."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import xxhash

from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.safetensors_file import FileDigests, TensorEntry, read_header

_CHUNK_BYTES = 1 << 22
_one_at_a_time = threading.Lock()


def file_digest(path: Path) -> str:
    """The sha256 of a whole file."""
    state = path.stat()
    with _one_at_a_time:  # what several threads ask for is read once
        return _file_digest(path, state.st_mtime_ns, state.st_size)


def tensor_checksum(entry: TensorEntry) -> str:
    """The XXH3-128 of a tensor's bytes: it need not stand up to a forger, and beside a sha256 it costs nothing."""
    return tensors_digests({"": entry})[1][entry]


def tensor_sha256(entry: TensorEntry) -> str:
    """The sha256 of a tensor's bytes, as they lie in its file."""
    state = entry.file.stat()
    return _tensor_sha256(entry, state.st_mtime_ns, state.st_size)


def tensors_digests(entries: Mapping[str, TensorEntry]) -> tuple[str, dict[TensorEntry, str]]:
    """Two digests of some tensors in one reading.

    Returns:
        The sha256 over names, dtypes, shapes and bytes, in the order of the names; and each tensor's checksum.
    """
    known = []
    for name, entry in sorted(entries.items()):
        state = entry.file.stat()
        known.append((name, entry, state.st_mtime_ns, state.st_size))
    return _digests(tuple(known))


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
            own, left = xxhash.xxh3_128(), entry.nbytes
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
def _tensor_sha256(entry: TensorEntry, mtime: int, size: int) -> str:
    digest, left = hashlib.sha256(), entry.nbytes
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            digest.update(chunk)
            left -= len(chunk) or left
    return digest.hexdigest()


@cache
def _digests(known: tuple[tuple[str, TensorEntry, int, int], ...]) -> tuple[str, dict[TensorEntry, str]]:
    digest, checksums = hashlib.sha256(), {}
    for name, entry, _, _ in known:
        digest.update(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
        own = xxhash.xxh3_128()
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                digest.update(chunk)
                own.update(chunk)
                left -= len(chunk) or left
        checksums[entry] = own.hexdigest()
    return digest.hexdigest(), checksums
