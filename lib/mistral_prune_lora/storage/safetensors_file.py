"""The safetensors format: checked reading of headers, positioned reading of tensors, streamed writing.

The format (https://github.com/huggingface/safetensors#format): eight bytes, the little-endian length of the header; the
header, JSON, padded with spaces; the tensors' bytes without gaps. The library reads it well but can only write a file
whose tensors are all in memory, which a 10 GB merge must not need; hence the writer here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.storage.dtype_names import ITEMSIZES
from mistral_prune_lora.storage.json_file import without_duplicates
from mistral_prune_lora.storage.plain_file import open_plain

if TYPE_CHECKING:
    import torch  # at run time where tensors are read or written: headers are also read while jobs are planned

_SORT_RANK = {name: rank for rank, name in enumerate(ITEMSIZES)}
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_LONGEST_NAME = 1000  # characters of a tensor's name
METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk.

    Attributes:
        file: the safetensors file.
        stored_name: its key in that file.
        dtype: its safetensors dtype name, e.g. "BF16".
        shape: its shape.
        start: absolute offset of its first byte in the file.
    """

    file: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return ITEMSIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.itemsize

    def read(self, rows: slice | None = None) -> torch.Tensor:
        """Read the tensor, or a slice of its first dimension (step 1), into fresh memory in its stored dtype.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        import torch

        from mistral_prune_lora.storage.dtypes import DTYPES

        shape, start = self.shape, self.start
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            row_bytes = self.nbytes // shape[0]
            shape, start = (max(0, last - first), *shape[1:]), start + first * row_bytes
        buffer = torch.empty(math.prod(shape) * self.itemsize, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            read_into(file.fileno(), buffer.numpy().data, start, self.file)
        return buffer.view(DTYPES[self.dtype]).view(shape)


def read_into(descriptor: int, view: memoryview, start: int, path: Path) -> None:
    """Fill `view` from absolute offset `start` of an open file; CheckpointError names `path` if it ends early."""
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], start + done)
        if got == 0:
            raise CheckpointError("the file ends before its tensors do", where=path, mend="fetch or write it again")
        done += got


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by their stored names, in the order of their bytes.

    Every claim of the header is checked against the file before it is believed: lengths, dtypes, shapes, and that the
    tensors fill the file without gaps or overlaps.

    Raises:
        CheckpointError: not a safetensors file, truncated, or with a header that contradicts itself or the file.
    """
    path = Path(path)
    mend = "fetch or write the file again"
    try:
        with open_plain(path, CheckpointError, mend=mend) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or not 2 <= length <= min(size - _LENGTH_BYTES, _MAX_HEADER):
                raise CheckpointError(
                    f"claims a header of {length} bytes in a file of {size}: not a safetensors file, or cut short",
                    where=path,
                    mend=mend,
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path, mend=mend) from None
    try:
        header = _parsed(raw)
        entries = [_entry(path, name, claim, _LENGTH_BYTES + length) for name, claim in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"has a malformed header: {error}", where=path, mend=mend) from None
    entries.sort(key=lambda e: (e.start, e.nbytes))
    expected = _LENGTH_BYTES + length
    for entry in entries:
        if entry.start != expected:
            raise CheckpointError(f"tensor {entry.stored_name} is not where it should be", where=path, mend=mend)
        expected += entry.nbytes
    if expected != size:
        raise CheckpointError(f"holds {size} bytes where its header promises {expected}", where=path, mend=mend)
    return {entry.stored_name: entry for entry in entries}


def _parsed(raw: bytes) -> dict[str, Mapping]:
    """The header without its metadata; the rules are the library's, where Python's JSON knows none."""
    text = raw.decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("it does not start with a brace")
    header = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=_not_natural, parse_int=_natural)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not made of strings")
    json.dumps(header, ensure_ascii=False).encode()  # half of a surrogate pair is no text: UnicodeEncodeError
    json.dumps(metadata, ensure_ascii=False).encode()
    return header


def _natural(digits: str) -> int:
    return _not_natural(digits) if digits.startswith("-") else int(digits)


def _not_natural(text: str) -> int:
    raise ValueError(f"{text} is not a natural number")


def _entry(path: Path, name: str, claim: Mapping, data_start: int) -> TensorEntry:
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a tensor's name has {len(name)} characters, and {_LONGEST_NAME} are the most")
    if claim.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} is described by {sorted(claim)}")
    if claim["dtype"] not in ITEMSIZES:
        raise ValueError(f"tensor {name} has the unknown dtype {claim['dtype']!r}")
    if not isinstance(claim["shape"], list) or not isinstance(claim["data_offsets"], list):
        raise ValueError(f"tensor {name} has a shape or offsets that are no list")
    numbers = [*claim["shape"], *claim["data_offsets"]]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError(f"tensor {name} has a shape or offset that is not a natural number, or too large a one")
    if math.prod(max(n, 1) for n in claim["shape"]) >= 1 << 60:
        raise ValueError(f"tensor {name} has a shape that is too large")
    first, last = claim["data_offsets"]
    entry = TensorEntry(path, name, claim["dtype"], tuple(claim["shape"]), data_start + first)
    if entry.nbytes != last - first:
        raise ValueError(f"tensor {name} has {last - first} bytes where its shape needs {entry.nbytes}")
    return entry


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


def plan_file(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[TensorSpec]]:
    """The first bytes of a safetensors file (length and header) and its tensors in the order they must follow.

    Equals what `safetensors.torch.save_file(..., metadata={"format": "pt"})` writes for the same tensors; `metadata`
    adds to it.
    """
    ordered = sorted(specs, key=lambda s: (-_SORT_RANK[s.dtype], s.name))
    header: dict[str, object] = {"__metadata__": METADATA | dict(metadata or {})}
    offset = 0
    for spec in ordered:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _LENGTH_BYTES)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw, ordered


@dataclass(frozen=True)
class FileDigests:
    """The sha256 of a safetensors file and of what it is made of.

    Attributes:
        sha256: of the whole file.
        header: of what stands before the tensors.
        tensors: the XXH3-128 of each tensor's bytes, by its name in the file.
    """

    sha256: str
    header: str
    tensors: dict[str, str]


def write_file(path: Path, specs: Iterable[TensorSpec], produce: Callable[[str], torch.Tensor]) -> FileDigests:
    """Write a safetensors file one tensor at a time, fsynced.

    Args:
        path: the file; the caller makes the result atomic (see transaction.py).
        specs: the tensors to write, in any order.
        produce: gives the tensor of a name, with the dtype and shape of its spec; called once a name, in file order.

    Returns:
        The digests of what was sent to the disk.
    """
    from mistral_prune_lora.storage.dtypes import DTYPE_NAMES

    head, ordered = plan_file(specs)
    whole, tensors = hashlib.sha256(head), {}
    with open(path, "wb") as file, ThreadPoolExecutor(1) as beside:
        file.write(head)
        for spec in ordered:
            tensor = produce(spec.name)
            if DTYPE_NAMES[tensor.dtype] != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{spec.name}: {tensor.dtype} {tuple(tensor.shape)} does not fit {spec}")
            data = tensor_bytes(tensor)
            digested = beside.submit(whole.update, data)
            tensors[spec.name] = xxhash.xxh3_128(data).hexdigest()
            file.write(data)
            digested.result()
        file.flush()
        os.fsync(file.fileno())
    return FileDigests(whole.hexdigest(), hashlib.sha256(head).hexdigest(), tensors)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
