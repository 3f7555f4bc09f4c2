"""Into how many shards the windows of a job are split. What is made is the same, so its name says nothing of it.

Snakemake runs a job again whose set of inputs is another one, and the shards are inputs of what is gathered from them.
So what was once made stays with the number of shards that it was made of, whatever the configuration asks for now:
another number runs nothing again. The process that plans decides, and its jobs are told, since they could not see why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path

from mistral_prune_lora.storage.json_file import read_json_if_there, write_json
from mistral_prune_lora.storage.transaction import atomic_file

FOLDER = "results/shared/shards"
_NAME = re.compile(r"/shards/.*\.\d+-of-(\d+)\.\w+$")


class Sharding:
    """How many shards each artefact has, decided once in a run of Snakemake.

    Its file holds those with more than one, for the jobs.
    """

    def __init__(self, memory: str | Path, *, decides: bool) -> None:
        """Args: memory: the file; decides: whether this process plans, or is one of its jobs and reads the file."""
        self._memory, self._decides = Path(memory), decides
        self._told: dict[str, int] = dict(read_json_if_there(self._memory) or {})
        self._decided: dict[str, int] = {}

    def count(self, artefact: str, find: Callable[[], int], *, keep: bool = True) -> int:
        """How many shards an artefact has.

        Args:
            artefact: its file.
            find: gives the number, in the process that plans, when it is first asked for.
            keep: whether jobs are to be told: none follow in a dry run.
        """
        if not self._decides:
            return self._told.get(artefact, 1)
        if artefact not in self._decided:
            self._decided[artefact] = find()
        count = self._decided[artefact]
        if keep and self._told.get(artefact, 1) != count:
            self._told[artefact] = count
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._memory) as fresh:
                write_json(fresh, {name: told for name, told in self._told.items() if told > 1})
        return count

    def known(self, artefact: str) -> int:
        """How many it has, as far as that is known yet; 1 before anybody has asked for `count`."""
        return (self._decided if self._decides else self._told).get(artefact, 1)


def shard_files(kind: str, name: str, count: int, endings: Iterable[str]) -> list[str]:
    """The files of all shards of an artefact, in order.

    Args:
        kind: its folder under results/shared.
        name: the artefact's.
        count: how many shards there are.
        endings: of the files that each of them has.
    """
    return [f"{FOLDER}/{kind}/{name}.{n}-of-{count}.{ending}" for ending in endings for n in range(1, count + 1)]


def made_of(inputs: Iterable[str] | None) -> int | None:
    """Of how many shards something was made, by the inputs that Snakemake has noted; None where it has noted none."""
    if inputs is None:
        return None
    return max((int(found[1]) for path in inputs if (found := _NAME.search(path))), default=1)


def sensible(wanted: int, windows: int, batch_size: int) -> int:
    """As many shards as are wanted, and no more than there are batches."""
    return min(wanted, ceil(windows / batch_size))
