"""Commands as forks of a process that has imported everything already: ten runs in the time of one start.

Whoever forks must have no threads: a fork has only the one that called it, and a lock that another one held stays
locked for ever. So the server imports and does nothing else; models are made and commands run in its children.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# What the commands import when they are run, and what makes transformers' lazy modules real.
_HEAVY = (
    "torch",
    "peft",
    "datasets",
    "pandas",
    "pyarrow.parquet",
    "gguf",
    "snakemake.common.configfile",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "transformers.integrations.gguf",
)
_ADDRESS_SPACE = 8 << 30  # bytes beyond the server's own; a bomb ends here instead of ending the machine
_CRASH = 70  # exit code of a child whose work raised


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code; None if a signal ended it.
        signal: the signal's number; 0 if there was none.
        seconds: how long it ran.
        grown: bytes of memory beyond what the server has.
        printed: all that it wrote to stdout and stderr.
    """

    code: int | None
    signal: int
    seconds: float
    grown: int
    printed: str


def preload() -> None:
    """Import all that a command imports; a RuntimeError if that has started threads."""
    import mistral_prune_lora

    for name in _HEAVY:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(mistral_prune_lora.__path__, "mistral_prune_lora."):
        importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # a fork that collects would touch, and so copy, all of what was imported
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads run, and a fork would have but one of them")


class Child:
    """A piece of work in a fork of this process, in a session of its own."""

    def __init__(self, work: Callable[[], int | None], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        """Start it in a folder; what it prints goes to a file."""
        self._log, self._began, self._own = log, time.monotonic(), _resident()
        self.pid = os.fork()
        if self.pid == 0:
            _work(work, folder, log, environment)
        self._descriptor = os.pidfd_open(self.pid)

    def wait(self, seconds: float) -> Ended | None:
        """How it ended; None if it has not within that time."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return None
        _, status, used = os.wait4(self.pid, 0)
        os.close(self._descriptor)
        return Ended(
            os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            time.monotonic() - self._began,
            max(0, used.ru_maxrss * 1024 - self._own),
            self._log.read_text(encoding="utf-8", errors="backslashreplace"),
        )

    def kill(self) -> Ended:
        """End it, and whatever it has started, by SIGKILL."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not come to its session yet, or has ended
            os.kill(self.pid, signal.SIGKILL)
        ended = self.wait(60)
        if ended is None:
            raise RuntimeError(f"process {self.pid} outlives SIGKILL")
        return ended


def _work(work: Callable[[], int | None], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    """Do the work of a child, and end it; never returns."""
    code = _CRASH
    try:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, signal.SIG_DFL)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ.update(environment)
        tempfile.tempdir = None
        os.chdir(folder)
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
