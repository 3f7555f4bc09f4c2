"""JSON as this pipeline writes it, indented for people to read too, and as it reads it: without trust in the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage.plain_file import lies_there, open_plain, too_large

MAX_BYTES = 64 << 20  # the index of a model of a million tensors has about as much
MAX_DEPTH = 100  # of lists and objects in each other
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as an escape, which may be half of a pair; UTF-8 knows none


def write_json(path: Path, content: Mapping) -> None:
    """Write an object to a file; the caller makes the result atomic (see transaction.py)."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(
    path: str | Path, kind: type[PipelineError] = PipelineError, *, mend: str | None = None, max_bytes: int = MAX_BYTES
) -> dict:
    """A JSON object from a file.

    Args:
        path: a regular file; a pipe or device is not waited for.
        kind: the error to raise.
        mend: what the error says to do.
        max_bytes: no more is read.

    Raises:
        kind: there is no such file, it is none, too large, not UTF-8, not JSON by the rules of `parsed`, or not an
            object.
    """
    with open_plain(path, kind, mend=mend) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise kind(f"cannot be read: {error.strerror}", where=path, mend=mend) from None
    if len(data) > max_bytes:
        raise too_large(path, kind, max_bytes, mend)
    try:
        content = parsed(data.decode("utf-8"))
    except ValueError as error:
        raise kind(f"cannot be read as JSON: {error}", where=path, mend=mend) from None
    if not isinstance(content, dict):
        raise kind("is not a JSON object", where=path, mend=mend)
    return content


def read_json_if_there(path: str | Path, kind: type[PipelineError] = PipelineError) -> dict | None:
    """A JSON object from a file, or None if nothing has that name; arguments and errors as for `read_json`."""
    return read_json(path, kind) if lies_there(path) else None


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON; a key stands twice in one object, so that it contradicts itself; a number is NaN or
            infinite; a string holds half of a surrogate pair, which cannot be written again; or it is nested deeper
            than MAX_DEPTH.
    """
    try:
        content = json.loads(
            text, object_pairs_hook=without_duplicates, parse_constant=_no_number, parse_float=_finite_number
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    if _SURROGATE.search(text):
        _check_pairs(content)
    return content


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """An object_pairs_hook for json.loads; ValueError if a key stands twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} stands twice")
            seen.add(key)
    return content


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _check_depth(content: object) -> None:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [value for values in inner for value in values]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_pairs(content: object) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a string holds half a surrogate pair") from None
