"""What a bundle puts back when it is restored: the original bytes of tensors that an adapter has changed elsewhere.

A's adapter makes up for layers that are missing. Where restoring them is to give the dense model again, the bundle
brings along what A's weights were before: `undo.safetensors`, beside its layers. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.directories import BUNDLE_META
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.storage.digests import tensor_sha256
from mistral_prune_lora.storage.json_file import read_json_if_there
from mistral_prune_lora.storage.plain_file import lies_there
from mistral_prune_lora.storage.safetensors_file import TensorEntry, read_header

UNDO_FILE = "undo.safetensors"
UNDO = "undo"  # the key of bundle_meta.json
_AGAIN = "merge the bundle again, with --undo_of"


@dataclass(frozen=True)
class Undo:
    """What a bundle puts back.

    Attributes:
        entries: the original tensors by canonical name.
        sha256: of each one's bytes.
        replaces: the sha256 of the bytes that each of them takes the place of.
    """

    entries: dict[str, TensorEntry]
    sha256: dict[str, str]
    replaces: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def layers(self) -> frozenset[int]:
        """The layers that it has tensors of."""
        return frozenset(int(match[1]) for match in map(LAYER_PREFIX.match, self.entries) if match)

    def described(self) -> dict:
        """What bundle_meta.json says of it."""
        tensors = {name: {"sha256": self.sha256[name], "replaces": self.replaces[name]} for name in self.entries}
        return {"file": UNDO_FILE, "bytes": self.nbytes, "tensors": tensors}


def read_undo(bundle: Checkpoint) -> Undo | None:
    """What a bundle puts back; None if it puts nothing back. Reads headers only.

    Raises:
        CheckpointError: the file is missing or malformed, or holds other tensors than bundle_meta.json names.
    """
    file, meta_path = bundle.path / UNDO_FILE, bundle.path / BUNDLE_META
    told = (read_json_if_there(meta_path, CheckpointError) or {}).get(UNDO) if bundle.kind == "bundle" else None
    if bundle.kind != "bundle" or (told is None and not lies_there(file)):
        return None
    tensors = told.get("tensors") if isinstance(told, dict) else None
    if not isinstance(tensors, dict) or not all(map(_is_told, tensors.values())):
        raise CheckpointError(f"does not say what {UNDO_FILE} puts back", where=meta_path, mend=_AGAIN)
    if bundle.written and lies_there(file):
        bundle.written.check_header(file)
    entries = read_header(file)
    if entries.keys() != tensors.keys():
        other = sorted(entries.keys() ^ tensors.keys())
        raise CheckpointError(f"and {BUNDLE_META} beside it differ about {other[0]}", where=file, mend=_AGAIN)
    digests = {key: {name: each[key] for name, each in tensors.items()} for key in ("sha256", "replaces")}
    return Undo(entries, digests["sha256"], digests["replaces"])


def put_back(parts: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The parts of one stage with every tensor that a bundle among them puts back in its original bytes.

    A part of which nothing is put back is returned as it is. Tensors that are put back already, as in the A model
    before its merge, stay where they lie.

    Args:
        parts: the A model and the bundles that are restored into it, in the order A, B, C.

    Raises:
        CheckpointError: as `read_undo`; what a bundle puts back is not what bundle_meta.json says, or it was made for
            other weights than those of these parts.
    """
    found = list(parts)
    for bundle in parts:
        undo = read_undo(bundle)
        if undo is None:
            continue
        found = [_with_original(part, undo, bundle) for part in found]
        if missing := _missing(undo, found):
            told = f"puts back {missing}, which {found[0].path.name} does not have"
            raise CheckpointError(told, where=bundle.path / UNDO_FILE, mend="use the A model that it was made for")
    return found


def changed_layers(before: Checkpoint, after: Checkpoint) -> frozenset[int]:
    """The layers of a part of which `put_back` has put something back; all of them if that is outside of layers."""
    names = [name for name, entry in before.entries.items() if after.entries[name] != entry]
    if not all(map(LAYER_PREFIX.match, names)):
        return frozenset(before.layers)
    return frozenset(int(match[1]) for match in map(LAYER_PREFIX.match, names) if match)


def _is_told(content: object) -> bool:
    return isinstance(content, Mapping) and all(isinstance(content.get(key), str) for key in ("sha256", "replaces"))


def _missing(undo: Undo, parts: Iterable[Checkpoint]) -> str | None:
    """A tensor that should be here and is not; of layers that no part here holds, nothing should."""
    held, layers = {name for part in parts for name in part.entries}, {i for part in parts for i in part.layers}
    for name in undo.entries.keys() - held:
        match = LAYER_PREFIX.match(name)
        if match is None or int(match[1]) in layers:
            return name
    return None


def _with_original(part: Checkpoint, undo: Undo, bundle: Checkpoint) -> Checkpoint:
    changed = {}
    for name in undo.entries.keys() & part.entries.keys():
        entry, there = undo.entries[name], part.entries[name]
        if entry.shape != there.shape:
            raise _foreign(part, bundle, name)
        if (found := tensor_sha256(there)) == undo.sha256[name] and there.dtype == entry.dtype:
            continue
        if found != undo.replaces[name]:
            raise _foreign(part, bundle, name)
        if tensor_sha256(entry) != undo.sha256[name]:
            told = f"{name} is not what {BUNDLE_META} says is put back"
            raise CheckpointError(told, where=entry.file, mend=_AGAIN)
        changed[name] = entry
    if not changed:
        return part
    beside = (*part.beside, *([bundle.written] if bundle.written else []))
    return replace(part, entries=part.entries | changed, beside=beside)


def _foreign(part: Checkpoint, bundle: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"was made for other weights than those of {part.path}: {name} is neither what it puts back nor what that"
        " takes the place of",
        where=bundle.path / UNDO_FILE,
        mend="use the bundle and the A model that were merged for each other",
    )
