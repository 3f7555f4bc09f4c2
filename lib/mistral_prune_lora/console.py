"""What a user sees while long work runs, and what a job's log keeps of it."""

from __future__ import annotations

import io
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from mistral_prune_lora.errors import as_mistake

_QUIET_SECONDS = 15  # between two lines of one bar, wherever no cursor can move


def progress(*, total: int | float, description: str, unit: str, **tqdm_options) -> tqdm:
    """A progress bar on stderr with count, rate and time left; a line every 15 s where stderr is no terminal.

    Args:
        total: the count at which the work is done.
        description: what is being done, e.g. "merge A".
        unit: what is counted; "B" scales to kB, MB, GB.
        tqdm_options: passed on to tqdm.
    """
    live = sys.stderr.isatty()
    scale = {"unit_scale": True, "unit_divisor": 1000} if unit == "B" else {}
    options = {"dynamic_ncols": live, "mininterval": 0.2 if live else _QUIET_SECONDS, **scale, **tqdm_options}
    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, **options)


_in_job = False


def in_job() -> bool:
    """Whether this process is a job of the workflow."""
    return _in_job


@contextmanager
def job(log: str | Path) -> Iterator[None]:
    """Run a workflow job: everything printed goes to the terminal and into `log`, errors too.

    A PipelineError, or lack of memory or disk space, ends the process with exit code 1 after its one line; anything
    else keeps its traceback.
    """
    global _in_job
    _in_job = True
    # Names may hold what is no UTF-8, and a log must not fail for it.
    with open(log, "w", encoding="utf-8", errors="backslashreplace") as file:
        out, err = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(out, file), _Tee(err, file)
        try:
            yield
        except BaseException as error:
            mistake = as_mistake(error)
            if mistake is None:
                if isinstance(error, Exception):
                    file.write(traceback.format_exc())
                raise
            print(f"error: {mistake}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            sys.stdout, sys.stderr, _in_job = out, err, False


class _Tee(io.TextIOBase):
    """Writes to a terminal as it comes, and to a log as whole lines: of a moving bar, one line now and then."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log, self._line, self._bar_logged = terminal, log, "", -float(_QUIET_SECONDS)

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    def write(self, text: str) -> int:
        self._terminal.write(text)
        # A bar starts each of its states with \r; a state that another overwrites is worth a line only now and then.
        for piece in re.split(r"(?<=\n)|(?=\r)", text):
            if piece.startswith("\r"):
                self._keep_overwritten()
            self._line += piece.lstrip("\r")
            if piece.endswith("\n"):
                self._log.write(self._line)
                self._line = ""
        return len(text)

    def _keep_overwritten(self) -> None:
        if self._line.strip() and time.monotonic() - self._bar_logged >= _QUIET_SECONDS:
            self._log.write(self._line.rstrip() + "\n")
            self._log.flush()
            self._bar_logged = time.monotonic()
        self._line = ""

    def flush(self) -> None:
        self._terminal.flush()
        self._log.flush()
