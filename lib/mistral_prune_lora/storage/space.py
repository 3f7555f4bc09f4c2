"""Whether there is room on disk for what will be written, asked before the work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.sizes import size_text
from mistral_prune_lora.storage.transaction import nearest_directory

_MEND = "free space or choose another place"


def require_space(needed: Mapping[Path, int], *, mend: str = _MEND) -> None:
    """Raise a PipelineError unless the file systems have room for all of some outputs at once.

    Args:
        needed: bytes by path; what lies on one file system is added up. A former result stays until the end, so what it
            takes is not free yet.
        mend: what the error says to do.
    """
    sums: dict[int, int] = {}
    for path, nbytes in needed.items():
        folder = nearest_directory(Path(os.path.realpath(path)).parent)
        device = folder.stat().st_dev
        sums[device] = sums.get(device, 0) + nbytes
        free = free_space(folder)
        if sums[device] > free:
            raise PipelineError(
                f"{size_text(sums[device])} are needed and {size_text(free)} are free", where=folder, mend=mend
            )


def free_space(path: Path) -> int:
    """Bytes that are free where a path lies or would lie."""
    return shutil.disk_usage(nearest_directory(Path(os.path.realpath(path)))).free


@contextmanager
def reserved_space(folder: Path, nbytes: int, *, where: str | Path) -> Iterator[None]:
    """Hold room in a directory for what will be written there after the block, so that nobody else can use it up.

    Args:
        folder: the fresh directory of an output.
        nbytes: more than zero.
        where: the output, for the error.

    Raises:
        PipelineError: there is no such room, by the disk's size or by a quota.
    """
    place = folder / "reserved"
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            raise PipelineError(
                f"{size_text(nbytes)} are needed and are not there: {error.strerror}", where=where, mend=_MEND
            ) from error
        yield
    finally:
        os.close(descriptor)
        place.unlink(missing_ok=True)
