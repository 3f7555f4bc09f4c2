"""Errors that tell a user what went wrong, where, and how to mend it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from mistral_prune_lora.version import package_line


class PipelineError(Exception):
    """A mistake in the input that the user can mend; printed as one line, without a traceback.

    Args:
        what: what is wrong, as a sentence without its full stop.
        where: the file, folder or flag that it was found in.
        mend: what to do about it, as a sentence without its full stop.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, mend: str | None = None) -> None:
        self.what, self.where, self.mend = what, where, mend
        line = f"{what} (in {where})" if where is not None else what
        super().__init__(f"{line}. {mend[0].upper()}{mend[1:]}." if mend else f"{line}.")


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


def reports_errors(main: Callable[..., None]) -> Callable[..., int]:
    """Wrap a command's `main` so that a PipelineError ends it with one line on stderr and exit code 1.

    The first line on stderr says which package runs, before the arguments are read: a checkout of other scripts under
    this package's name may lie in the working directory, and whoever refuses a flag should be known.

    Returns a function that returns the exit code, for `sys.exit`. Anything else keeps its traceback: it is our bug.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        print(package_line(), file=sys.stderr, flush=True)
        try:
            main(*args, **kwargs)
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: nothing half-written was kept", file=sys.stderr)
            return 130
        return 0

    return run
