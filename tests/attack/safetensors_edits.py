"""What can be done to a safetensors file: its header contradicts it, or is sound and says something else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

from attack.json_edits import MEANINGS, as_text

NUMBERS = {  # the most significant bytes of a number, as they are in every floating-point format
    "NaN": b"\xff\x7f",
    "infinity": b"\x80\x7f",
    "minus infinity": b"\x80\xff",
    "the largest": b"\x7f\x7f",
}
_LENGTH = 8


def _split(data: bytes) -> tuple[dict, bytes] | None:
    try:
        length = int.from_bytes(data[:_LENGTH], "little")
        header = json.loads(data[_LENGTH : _LENGTH + length])
        named = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return (header, data[_LENGTH + length :]) if named else None


def _joined(header: dict | str, body: bytes) -> bytes:
    raw = as_text(header).encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % _LENGTH)
    return struct.pack("<Q", len(raw)) + raw + body


def _of_header(do: Callable[..., object]) -> Callable[..., bytes]:
    """An edit of the header as of any JSON object, its length kept right."""

    def edit(data: bytes, *arguments: object) -> bytes:
        parts = _split(data)
        return _joined(do(parts[0], *arguments), parts[1]) if parts else data

    return edit


def _of_tensors(do: Callable[..., bytes]) -> Callable[..., bytes]:
    """An edit of header, names of tensors and body."""

    def edit(data: bytes, *arguments: object) -> bytes:
        parts = _split(data)
        if parts is None:
            return data
        names = [name for name in parts[0] if name != "__metadata__"]
        return do(*parts, names, *arguments)

    return edit


def _pick(names: list[str], share: float) -> str:
    return names[min(int(share * len(names)), len(names) - 1)]


def _names_exchanged(header: dict, body: bytes, names: list[str], first: float, second: float) -> bytes:
    a, b = _pick(names, first), _pick(names, second)
    header[a], header[b] = header[b], header[a]
    return _joined(header, body)


def _retyped(header: dict, body: bytes, names: list[str], share: float, dtype: str) -> bytes:
    header[_pick(names, share)]["dtype"] = dtype
    return _joined(header, body)


def _reshaped(header: dict, body: bytes, names: list[str], share: float, how: str) -> bytes:
    entry = header[_pick(names, share)]
    shape = entry["shape"]
    changes = {"reversed": shape[::-1], "flat": [1, *shape], "huge": [*shape, 2**40], "none": []}
    entry["shape"] = changes.get(how, shape)
    return _joined(header, body)


def _moved(header: dict, body: bytes, names: list[str], share: float, by: int) -> bytes:
    entry = header[_pick(names, share)]
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    return _joined(header, body)


def _left_out(header: dict, body: bytes, names: list[str], share: float) -> bytes:
    """A sound file without one tensor."""
    gone = header.pop(_pick(names, share))
    first, last = gone["data_offsets"]
    for name in names:
        if name in header and header[name]["data_offsets"][0] >= last:
            header[name]["data_offsets"] = [offset - (last - first) for offset in header[name]["data_offsets"]]
    return _joined(header, body[:first] + body[last:])


def _added(header: dict, body: bytes, names: list[str], name: str) -> bytes:
    """A sound file with one more tensor."""
    header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [len(body), len(body) + 8]}
    return _joined(header, body + b"\0" * 8)


def _renamed(header: dict, body: bytes, names: list[str], share: float, ending: str) -> bytes:
    name = _pick(names, share)
    header[name + ending] = header.pop(name)
    return _joined(header, body)


def _valued(header: dict, body: bytes, names: list[str], share: float, place: float, number: str) -> bytes:
    """One number of a tensor is none."""
    first, last = header[_pick(names, share)]["data_offsets"]
    width = 4 if header[_pick(names, share)]["dtype"] == "F32" else 2
    at = first + int(place * (last - first)) // width * width + width - 2
    return _joined(header, body[:at] + NUMBERS[number] + body[at + 2 :])


def _length_is(data: bytes, by: int) -> bytes:
    length = int.from_bytes(data[:_LENGTH], "little")
    return ((length + by) % (1 << 64)).to_bytes(_LENGTH, "little") + data[_LENGTH:]


SAFETENSORS_EDITS: dict[str, Callable[..., bytes]] = {
    **{f"header: {name}": _of_header(do) for name, do in MEANINGS.items()},
    "tensors exchanged": _of_tensors(_names_exchanged),
    "tensor of type": _of_tensors(_retyped),
    "tensor's shape": _of_tensors(_reshaped),
    "tensor moved": _of_tensors(_moved),
    "tensor left out": _of_tensors(_left_out),
    "tensor added": _of_tensors(_added),
    "tensor renamed": _of_tensors(_renamed),
    "number is": _of_tensors(_valued),
    "length of the header": _length_is,
}
