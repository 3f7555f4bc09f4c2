"""Opening a file that somebody else made: only a regular one, since a pipe waits for ever and a device never ends."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mistral_prune_lora.errors import PipelineError


@contextmanager
def open_plain(
    path: str | Path, kind: type[PipelineError] = PipelineError, *, mend: str | None = None
) -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes; links are followed.

    Args:
        path: the file.
        kind: the error to raise.
        mend: what the error says to do.

    Raises:
        kind: there is no such file, it may not be read, or is a folder, pipe, socket or device.
    """
    try:
        # A pipe without a writer would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise kind(f"cannot be read: {error.strerror}", where=path, mend=mend) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise kind("is not a regular file", where=path, mend=mend)
    with open(descriptor, "rb") as file:
        yield file


def check_plain(
    path: str | Path,
    kind: type[PipelineError] = PipelineError,
    *,
    max_bytes: int | None = None,
    mend: str | None = None,
) -> None:
    """Raise `kind` unless a library may be left to open a file: a regular one, of at most `max_bytes`."""
    with open_plain(path, kind, mend=mend) as file:
        if max_bytes is not None and os.fstat(file.fileno()).st_size > max_bytes:
            raise too_large(path, kind, max_bytes, mend)


def too_large(path: str | Path, kind: type[PipelineError], max_bytes: int, mend: str | None = None) -> PipelineError:
    """The error for more than is read of a file."""
    return kind(f"is larger than {max_bytes >> 20} MiB, the most that is read here", where=path, mend=mend)


def lies_there(path: str | Path) -> bool:
    """Whether anything has that name, be it a dead link: what is there and cannot be read must not pass for absent."""
    return os.path.lexists(path)
