"""The tensors of what is written: where each comes from, what is added to it, and which file it goes into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mistral_prune_lora.checkpoints.adapter import Update
from mistral_prune_lora.checkpoints.directories import SINGLE_FILE
from mistral_prune_lora.storage.safetensors_file import TensorEntry, TensorSpec


@dataclass(frozen=True)
class Item:
    """One tensor of the output: where it comes from and what is added to it, in order."""

    spec: TensorSpec
    entry: TensorEntry
    updates: tuple[Update, ...] = ()


class TensorFiles:
    """A plan of weight files.

    Attributes:
        files: for each output file, its tensors.
    """

    files: dict[str, list[Item]]

    @property
    def items(self) -> list[Item]:
        """Every tensor of the output."""
        return [item for items in self.files.values() for item in items]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(item.spec.nbytes for item in self.items)


def copied(entries: Mapping[str, TensorEntry]) -> list[Item]:
    """Tensors as they are, by the names that they are to have."""
    return [Item(TensorSpec(name, entry.dtype, entry.shape), entry) for name, entry in entries.items()]


def split_files(items: Sequence[Item], max_shard_size: int | None) -> dict[str, list[Item]]:
    """One file, or shards of at most `max_shard_size` bytes filled in the order of the items."""
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if max_shard_size and shards[-1] and filled + item.spec.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.spec.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": items for i, items in enumerate(shards, 1)}


def shard_index(files: Mapping[str, Sequence[Item]]) -> dict | None:
    """The content of a full model's model.safetensors.index.json, or None for a single file."""
    if len(files) == 1:
        return None
    weight_map = {item.spec.name: file for file, items in files.items() for item in items}
    total = sum(item.spec.nbytes for items in files.values() for item in items)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
