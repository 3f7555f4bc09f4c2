"""Errors that tell a user what went wrong, where, and how to mend it."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mistral_prune_lora.provenance import package_line

_PREFIX = "error: "
_LONGEST = 500 - len(_PREFIX)  # characters; a path alone may have 4096
_NO_MEMORY = re.compile(
    r"can't start new thread|(not enough|out of) memory|(can't|cannot|unable to) allocate|bad_alloc"
    r"|failed to map segment|resource temporarily unavailable",
    re.IGNORECASE,
)
# What a library in Rust makes of a full disk, which is no OSError.
_NO_ROOM_TOLD = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE}


class PipelineError(Exception):
    """A mistake in the input that the user can mend; printed as one line, without a traceback.

    The line has at most 500 characters; what is longer is cut in its middle. Control characters, which a name may hold,
    are escaped.

    Args:
        what: what is wrong, as a sentence without its full stop.
        where: the file, folder or flag that it was found in.
        mend: what to do about it, as a sentence without its full stop.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, mend: str | None = None) -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(_line(what, where, mend))


class LayoutError(PipelineError):
    """The layers of A, B and C contradict each other, the manifest or the model."""


class CheckpointError(PipelineError):
    """A model or bundle directory cannot be read: a missing, truncated or malformed file."""


class AdapterError(PipelineError):
    """A LoRA adapter cannot be used for this target."""


class DataError(PipelineError):
    """A text or dataset cannot be found, read or cut into windows."""


class SourceError(PipelineError):
    """The dense model cannot be fetched or converted."""


class DeviceError(PipelineError):
    """The device asked for is not there."""


class NumberError(PipelineError):
    """A number came out as NaN or infinity, which is no result.

    Args:
        what, where, mend: as for every PipelineError.
        window: the window whose hidden states it was found in; None where that is not the point.
    """

    def __init__(
        self, what: str, *, where: str | Path | None = None, mend: str | None = None, window: int | None = None
    ) -> None:
        super().__init__(what, where=where, mend=mend)
        self.window = window


def printable(text: str) -> str:
    """A text as one line that does nothing to a terminal: what cannot be shown stands as an escape, such as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str, length: int) -> str:
    """A text of at most `length` characters, with an ellipsis for its middle if it has more."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def _line(what: str, where: str | Path | None, mend: str | None) -> str:
    pieces = [printable(str(piece)) for piece in (what, "" if where is None else where, mend or "")]
    frame = len(" (in ). .")
    # The longest is cut first, at most to the length of the next: what to do is hardly ever that long.
    while (excess := sum(map(len, pieces)) + frame - _LONGEST) > 0:
        *_, second, longest = sorted(pieces, key=len)
        keep = max(len(longest) - excess, min(len(second), _LONGEST // 4))
        pieces[pieces.index(longest)] = shortened(longest, keep)
    told, place, advice = pieces
    line = told if where is None else f"{told} (in {place})"
    return f"{line}. {advice[0].upper()}{advice[1:]}." if advice else f"{line}."


def as_mistake(error: BaseException) -> PipelineError | None:
    """What to tell the user of an error that is no bug: itself, or in one line what the machine has too little of.

    Returns None for a bug, and for what is no error. A library in Rust that gets no thread raises what is no Exception.
    """
    if isinstance(error, PipelineError):
        return error
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or _NO_MEMORY.search(first):
        return PipelineError(
            f"there is not enough memory, or there are too many threads: {first}",
            mend="Give it more, or ask for less: a smaller batch, shorter windows, a smaller --max_memory",
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return PipelineError(error.strerror or first, where=error.filename, mend="Mend that and run the same again")
    if room := _NO_ROOM_TOLD.search(first):
        return PipelineError(room[0], mend="Mend that and run the same again")
    return None


def reports_errors(main: Callable[..., None]) -> Callable[..., int]:
    """Wrap a command's `main` so that a PipelineError ends it with one line on stderr and exit code 1.

    The first line on stderr says which package runs, before the arguments are read: a checkout of other scripts under
    this package's name may lie in the working directory, and whoever refuses a flag should be known.

    Every command passes here before torch is imported, which is when the threads of OpenMP learn how to wait. They are
    to sleep, unless OMP_WAIT_POLICY says otherwise: spinning, they keep others from cores that the command shares.

    Returns a function that returns the exit code, for `sys.exit`. Lack of memory or disk space is told likewise.
    Anything else keeps its traceback: it is our bug.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        print(package_line(), file=sys.stderr, flush=True)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            main(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted: nothing half-written was kept", file=sys.stderr)
            return 130
        except BaseException as error:
            mistake = as_mistake(error)
            if mistake is None:
                raise
            print(f"{_PREFIX}{mistake}", file=sys.stderr)
            return 1
        return 0

    return run
