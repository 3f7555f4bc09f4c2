"""JSON as this pipeline writes it, indented for people to read too, and as it reads it: without trust in the file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.errors import PipelineError

MAX_BYTES = 64 << 20  # the index of a model of a million tensors has about as much


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
        kind: there is no such file, it is none, too large, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise kind("is not a regular file", where=path, mend=mend)
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise kind(f"cannot be read: {error.strerror}", where=path, mend=mend) from None
    if len(data) > max_bytes:
        raise kind(f"is larger than {max_bytes >> 20} MiB, the most that is read here", where=path, mend=mend)
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise kind("cannot be read as JSON: it is nested too deeply", where=path, mend=mend) from None
    except ValueError as error:
        raise kind(f"cannot be read as JSON: {error}", where=path, mend=mend) from None
    if not isinstance(content, dict):
        raise kind("is not a JSON object", where=path, mend=mend)
    return content
