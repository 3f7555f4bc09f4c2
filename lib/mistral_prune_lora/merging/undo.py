"""The original bytes that a merged bundle brings along: which tensors, found from records, and how large they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning
from mistral_prune_lora.checkpoints.undo import UNDO, UNDO_FILE, Undo, read_undo
from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.merging.tensor_files import Item, copied
from mistral_prune_lora.storage.digests import tensor_checksum, tensor_sha256
from mistral_prune_lora.storage.safetensors_file import TensorEntry, read_header

_MUCH = 0.5  # of a part's bytes: more than this saves nobody a second copy of it
_FLAG = "--undo_of"


@dataclass(frozen=True)
class UndoPlan:
    """What a bundle will put back.

    Attributes:
        undo: the original tensors, where they lie now.
        original: the part that they are of, before its merge; None where a bundle's own are carried over.
        part_bytes: the size of that part.
    """

    undo: Undo
    original: Checkpoint | None
    part_bytes: int

    @property
    def items(self) -> list[Item]:
        """The tensors of the undo file."""
        return copied(self.undo.entries)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that they are read from."""
        return tuple(dict.fromkeys(entry.file for entry in self.undo.entries.values()))

    def described(self) -> dict:
        """What bundle_meta.json says of it."""
        return {UNDO: self.undo.described()}

    def tell(self) -> None:
        """Say on stderr how large it is, and whether that is worth it."""
        size = f"{self.undo.nbytes / 1e6:.1f} MB"
        if self.original is None:
            print(f"{UNDO_FILE} is carried over: {len(self.undo.entries)} tensors, {size}", file=sys.stderr)
            return
        share = self.undo.nbytes / self.part_bytes
        told = f"{UNDO_FILE}: {len(self.undo.entries)} original tensors of {self.original.path}, {size}, {share:.1%} of"
        print(f"{told} its weights", file=sys.stderr)
        if share > _MUCH:
            print(
                f"warning: the adapter changes most of {self.original.path}, so that restoring this bundle reads it a"
                " second time. Undoing is for an adapter that is confined to few weights: one in closed form, or LoRA"
                " on few layers or modules.",
                file=sys.stderr,
            )


def plan_undo(bundle: Checkpoint, undo_of: tuple[str | Path, str | Path] | None) -> UndoPlan | None:
    """What a bundle will put back: the tensors that a merge has changed, or what the bundle puts back already.

    Args:
        bundle: what is merged into.
        undo_of: a part before its merge and after it; None where nothing else is to be put back.

    Returns:
        None if it puts nothing back.

    Raises:
        CheckpointError: a part cannot be read; the two are not one part before and after a merge; a tensor is not what
            its record says.
        LayoutError: they are of another pruning than the bundle.
        PipelineError: the bundle puts something back already, or the merge has changed nothing.
    """
    carried = read_undo(bundle)
    if undo_of is None:
        return UndoPlan(carried, None, 0) if carried else None
    if carried:
        raise PipelineError(
            f"there is an {UNDO_FILE} already", where=bundle.path, mend=f"leave {_FLAG} out, or give the pruned bundle"
        )
    original, merged = map(open_checkpoint, undo_of)
    check_same_pruning([original.path, merged.path, bundle.path])
    names = _changed(original, merged)
    if not names:
        raise PipelineError(
            f"differs in nothing from {original.path}",
            where=f"{_FLAG} {merged.path}",
            mend="give the part before its merge, and then the merged one",
        )
    if own := sorted(set(bundle.entries) & set(names)):
        raise PipelineError(
            f"{own[0]} is the bundle's own", where=_FLAG, mend="give the part that was healed before it"
        )
    entries = {name: original.entries[name] for name in names}
    original.check_tensors(entries.values())
    merged.check_tensors(merged.entries[name] for name in names)
    sha256 = {name: tensor_sha256(entry) for name, entry in entries.items()}
    replaces = {name: tensor_sha256(merged.entries[name]) for name in names}
    size = sum(original.entries[name].nbytes for name in merged.entries)
    return UndoPlan(Undo(entries, sha256, replaces), original, size)


def check_undo(plan: UndoPlan, folder: Path) -> None:
    """Raise a CheckpointError unless an undo file that was written has the bytes that were to be put back."""
    for name, entry in read_header(folder / UNDO_FILE).items():
        if tensor_sha256(entry) != plan.undo.sha256[name]:
            raise CheckpointError(
                f"{name} is not the original one",
                where=UNDO_FILE,
                mend="merge again; if it fails again, check the disk and the memory",
            )


def _changed(original: Checkpoint, merged: Checkpoint) -> list[str]:
    """The tensors that a merge has changed, in the order of the part they are of."""
    strangers = [
        name
        for name, entry in merged.entries.items()
        if name not in original.entries or original.entries[name].shape != entry.shape
    ]
    if strangers or original.kind != merged.kind:
        told = f"has no {strangers[0]} of that shape" if strangers else f"is a {original.kind}"
        raise CheckpointError(
            f"{told}, unlike {merged.path}",
            where=f"{_FLAG} {original.path}",
            mend="give one part before its merge and after it",
        )
    return [name for name, entry in merged.entries.items() if _differs(original, merged, name, entry)]


def _differs(original: Checkpoint, merged: Checkpoint, name: str, entry: TensorEntry) -> bool:
    before = original.entries[name]
    return before.dtype != entry.dtype or _checksum(original, before) != _checksum(merged, entry)


def _checksum(part: Checkpoint, entry: TensorEntry) -> str:
    """A tensor's checksum, from the part's record where that has it; the header was held against it."""
    told = part.written.weights.get(entry.file.name) if part.written else None
    tensors = told.get("tensors") if isinstance(told, Mapping) else None
    known = tensors.get(entry.stored_name) if isinstance(tensors, Mapping) else None
    return known if isinstance(known, str) else tensor_checksum(entry)
