"""What can be done to any file: to its bytes, or to the name that it lies under."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

DEPTH = 100_000  # of nested lists: far beyond what Python's parser goes down to

# Whole contents that files of any format have been found to have.
CONTENTS = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "a number of 5000 digits": b"9" * 5000,
    "an endless exponent": b'{"num_hidden_layers": 1e999}',
    "nested lists": b"[" * DEPTH,
    "nested objects": b'{"a":' * DEPTH,
    "NUL bytes": b"\0" * 4096,
    "a line end": b"\n",
    "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5\n",
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x05touch\x85R.",
    "a zip": b"PK\x03\x04\x14\x00\x00\x00\x00\x00" + b"\0" * 100,
}

# Nodes that are no regular file, or none at all. All are made without privileges.
NODES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to a directory": lambda path: path.symlink_to("."),
    "not there": lambda path: None,
    "a hole of 1 TB": lambda path: _hole(path, 1 << 40),
    "a hole of 60 MB": lambda path: _hole(path, 60 << 20),
}


def _hole(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def _at(data: Sequence, share: float) -> int:
    return min(int(len(data) * share), max(0, len(data) - 1))


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _beheaded(data: bytes, count: int) -> bytes:
    return data[count:]


def _flipped(data: bytes, share: float, bit: int) -> bytes:
    at = _at(data, share)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if data else data


def _overwritten(data: bytes, share: float, count: int, seed: int) -> bytes:
    at = _at(data, share)
    noise = random.Random(seed).randbytes(count)
    return data[:at] + noise[: len(data) - at] + data[at + count :]


def _zeroed(data: bytes, share: float, count: int) -> bytes:
    at = _at(data, share)
    return data[:at] + b"\0" * len(data[at : at + count]) + data[at + count :]


def _inserted(data: bytes, share: float, what: str) -> bytes:
    at = _at(data, share)
    return data[:at] + what.encode("latin-1") + data[at:]


def _exchanged(data: bytes, first: float, second: float, count: int) -> bytes:
    a, b = sorted((_at(data, first), _at(data, second)))
    if b - a < count:
        return data
    return data[:a] + data[b : b + count] + data[a + count : b] + data[a : a + count] + data[b + count :]


BYTE_EDITS: dict[str, Callable[..., bytes]] = {
    "cut": _cut,
    "beheaded": _beheaded,
    "bit flipped": _flipped,
    "overwritten with noise": _overwritten,
    "zeroed": _zeroed,
    "inserted": _inserted,
    "blocks exchanged": _exchanged,
    "content replaced by": lambda data, name: CONTENTS[name],
    "twice in a row": lambda data: data + data,
    "NUL bytes behind": lambda data, count: data + b"\0" * count,
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "Latin-1": lambda data: b"\xe4\xf6\xfc" + data,
    "UTF-16": lambda data: data.decode("latin-1").encode("utf-16"),
}
