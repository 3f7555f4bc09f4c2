"""What can be done to a GGUF file: the numbers in its header, and the names and sizes of its tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

_UINT32, _FLOAT32 = 4, 6  # types of values, as the format numbers them
_NUMBER = re.compile(rb"[a-z0-9_]+(?:\.[a-z0-9_]+)+(?=(?:\x04|\x06)\x00\x00\x00)")
_TENSOR = re.compile(rb"(?:blk\.\d+|token_embd|output|output_norm)[a-z_.]*weight")


def _field(data: bytes, share: float) -> tuple[int, int] | None:
    """The type of a number in the header, and where it lies."""
    found = list(_NUMBER.finditer(data))
    if not found:
        return None
    end = found[min(int(share * len(found)), len(found) - 1)].end()
    return struct.unpack_from("<I", data, end)[0], end + 4


def _shifted(data: bytes, share: float, by: int) -> bytes:
    place = _field(data, share)
    if place is None or place[0] != _UINT32 or len(data) < place[1] + 4:
        return data
    (number,) = struct.unpack_from("<I", data, place[1])
    return data[: place[1]] + struct.pack("<I", (number + by) % (1 << 32)) + data[place[1] + 4 :]


def _retyped(data: bytes, share: float, kind: int) -> bytes:
    place = _field(data, share)
    return data if place is None else data[: place[1] - 4] + struct.pack("<I", kind) + data[place[1] :]


def _misnamed(data: bytes, share: float) -> bytes:
    """A key that is spelt otherwise."""
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    end = found[min(int(share * len(found)), len(found) - 1)].end()
    return data[: end - 1] + b"~" + data[end:]


def _tensor_renamed(data: bytes, share: float, name: str) -> bytes:
    found = list(_TENSOR.finditer(data))
    if not found:
        return data
    match = found[min(int(share * len(found)), len(found) - 1)]
    renamed = name.encode().ljust(len(match[0]), b"x")[: len(match[0])]
    return data[: match.start()] + renamed + data[match.end() :]


def _tensors_exchanged(data: bytes, first: float, second: float) -> bytes:
    """The names of two tensors stand for each other, if they are of one length."""
    found = list(_TENSOR.finditer(data))
    if not found:
        return data
    a, b = sorted(found[min(int(s * len(found)), len(found) - 1)].span() for s in (first, second))
    if a[1] - a[0] != b[1] - b[0] or a == b:
        return data
    return data[: a[0]] + data[slice(*b)] + data[a[1] : b[0]] + data[slice(*a)] + data[b[1] :]


GGUF_EDITS: dict[str, Callable[..., bytes]] = {
    "header's number shifted": _shifted,
    "header's number of type": _retyped,
    "header's key misspelt": _misnamed,
    "GGUF tensor renamed": _tensor_renamed,
    "GGUF tensors exchanged": _tensors_exchanged,
}
