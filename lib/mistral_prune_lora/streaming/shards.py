"""A run over some of the windows, and the runs over all of them put together again, with the bits of a single one.

A shard takes whole batches, so that batch k is the same windows however many shards there are. What it writes is what a
run over its windows alone would write; gathered, the record speaks of all windows, as if there had been no shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.storage.activations import ActivationReader, ActivationWriter
from mistral_prune_lora.text.windows import Windows, windows_between

_AGAIN = "Delete it and run the same again"


@dataclass(frozen=True)
class Shard:
    """One of several runs that share the windows.

    Attributes:
        number: which one, from 1.
        of: how many there are.
    """

    number: int
    of: int

    @classmethod
    def named(cls, name: str | None) -> Shard | None:
        """As its files name it, "2-of-4"; None stands for all windows at once."""
        return None if name is None else cls(*map(int, name.split("-of-")))

    def span(self, windows: int, batch_size: int) -> tuple[int, int]:
        """Its first window and the one after its last: whole batches, of all shards as many as may be, or one less.

        Raises:
            DataError: there are fewer batches than shards, and none is left for this one.
        """
        batches = ceil(windows / batch_size)
        first, last = (batches * number // self.of for number in (self.number - 1, self.number))
        if first == last:
            raise DataError(
                f"{windows} windows make {batches} batches of {batch_size}, too few for {self.of} shards",
                where="shards",
                mend=f"ask for {batches} at most",
            )
        return first * batch_size, min(last * batch_size, windows)


def whole_record(records: Mapping[str | Path, Mapping], windows: Windows, batch_size: int) -> dict:
    """The record that a run over all windows has, from those of its shards.

    Args:
        records: of every shard in order, by its file.
        windows: all of them.
        batch_size: windows in a batch.

    Raises:
        DataError: a shard is of other windows, or was run otherwise than the first: with other weights, on another kind
            of device, with another number of threads or another version of torch.
    """
    _, first = next(iter(records.items()))
    for number, (file, record) in enumerate(records.items(), 1):
        span = Shard(number, len(records)).span(len(windows), batch_size)
        wanted = _of_windows(windows_between(windows, *span), first)
        other = sorted(key for key in {*first, *record} if record.get(key) != {**first, **wanted}.get(key))
        if other:
            told = "of other windows" if other[0] in wanted else "run otherwise than the first one"
            raise DataError(f"this shard was {told} ({other[0]} differs)", where=file, mend=_AGAIN)
    return {**first, **_of_windows(windows, first)}


def _of_windows(windows: Windows, record: Mapping) -> dict:
    """What a record says of its windows, of the keys that it has."""
    told = {
        "ids_sha256": windows.identity.ids_sha256,
        "windows": len(windows),
        "shape": list(windows.ids.shape),
    }
    return {key: value for key, value in told.items() if key in record}


def gather_activations(files: Sequence[str | Path], windows: Windows, batch_size: int, output: str | Path) -> None:
    """Put the boundary activations of all shards into one file, the one that a run over all windows writes.

    A killed one goes on from its last finished batch.

    Args:
        files: of every shard, in order.
        windows: all of them.
        batch_size: windows in a batch.
        output: the file.

    Raises:
        DataError, CheckpointError: a shard is not what it should be, see `whole_record`, or is damaged.
        PipelineError: the disk has not enough space.
    """
    shards = [ActivationReader(file) for file in files]
    record = whole_record({shard.path: shard.run for shard in shards}, windows, batch_size)
    shape = (*windows.ids.shape, shards[0].shape[2])
    with ActivationWriter(output, shape, shards[0].dtype, batch_size, record) as whole:
        batch = 0
        for shard in shards:
            for first in range(0, shard.shape[0], batch_size):
                if batch not in whole.done:
                    whole.write(batch, shard.read(first, min(first + batch_size, shard.shape[0])))
                batch += 1
        whole.finish()
