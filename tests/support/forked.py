"""Work in a process of its own, which may be killed or limited, without the seconds that a fresh one takes to import.

It is forked from a server that has imported everything and computed nothing: in a fork of pytest's own process, torch
would wait for threads that are not there.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "pytest",
        "mistral_prune_lora.mistral_eval_ppl_mergedmodel",
        "mistral_prune_lora.pruning.mistral_merge_adapter",
        "mistral_prune_lora.export_stage",
        "mistral_prune_lora.merging.merge",
        "training_jobs",
        # What the tests' own modules import, which a fork imports for the sake of the function that it is given.
        "evaluation_project",
        "merge_oracle",
        "output_project",
        "transformers.models.mistral.modeling_mistral",
    ]
)
_LONGEST = 120  # seconds


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    code: int
    out: str
    err: str


class Forked:
    """A process that works; what it prints must fit into a pipe, as nobody reads it before its end."""

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        """Start it.

        Args:
            work: a function of a module, whose result is the exit code.
            arguments: its arguments.
        """
        pipes = [_SERVER.Pipe(duplex=False) for _ in range(2)]
        self._printed = [reader for reader, _ in pipes]
        writers = [writer for _, writer in pipes]
        self.process: BaseProcess = _SERVER.Process(target=_work, args=(writers, work, arguments))
        self.process.start()
        for writer in writers:
            writer.close()

    def wait(self) -> Ended:
        """Wait for its end."""
        self.process.join(_LONGEST)
        assert self.process.exitcode is not None, "it hangs"
        return Ended(self.process.exitcode, *map(_read, self._printed))


def run_limited(limit: int, main: Callable[..., object], words: list[str]) -> object:
    """Run a command that can write no file of more than `limit` bytes, which stands in for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(words)


def _work(writers: list[Connection], work: Callable[..., object], arguments: tuple) -> None:
    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    sys.exit(work(*arguments))


def _read(pipe: Connection) -> str:
    with open(os.dup(pipe.fileno()), encoding="utf-8") as file:
        return file.read()
