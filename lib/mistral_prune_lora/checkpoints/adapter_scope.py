"""Which part of a pruned model an adapter is for, and whether it can be meant for it.

PEFT matches names: an adapter that counts layers in another way is loaded onto whatever layers have the same numbers,
and the rest of it is dropped. Here such an adapter is refused, by the merge and by the evaluation alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mistral_prune_lora.checkpoints.adapter import WEIGHTS_FILE, Adapter, open_adapter
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX, layer_prefix
from mistral_prune_lora.errors import AdapterError, CheckpointError
from mistral_prune_lora.layout.partition import Layout, spans
from mistral_prune_lora.storage.json_file import read_json_if_there

_PART_IN_NAME = re.compile(r"(?:^|[^a-z])(?:([abc])_?(?:lora|adapter)|stage_?([abc]))(?![a-z])", re.IGNORECASE)


def from_compact(adapter: Adapter, layout: Layout) -> Adapter:
    """An adapter whose layer i is the i-th layer that A keeps, under original indices.

    Raises:
        AdapterError: it has layers beyond those that A keeps, so it cannot count in that way.
    """
    beyond = [layer for layer in adapter.layers if layer >= len(layout.kept)]
    if beyond or not adapter.layers:
        raise AdapterError(
            f"has tensors of layers {spans(adapter.layers)}, and A keeps {len(layout.kept)} layers: it does not count"
            " them from 0",
            where=adapter.path,
            mend="leave --adapter_indices compact out (adapter_indices in the configuration)",
        )
    updates = {}
    for module, update in adapter.updates.items():
        match = LAYER_PREFIX.match(module)
        name = layer_prefix(layout.kept[int(match[1])]) + module[match.end() :] if match else module
        updates[name] = replace(update, module=name)
    return replace(adapter, updates=updates, compact=layout.kept)


def is_compact(adapter: Adapter, layout: Layout) -> bool:
    """Whether an adapter's layers are 0 .. n-1 for the n layers that A keeps, and these are not A's layers."""
    counted = tuple(range(len(layout.kept)))
    return adapter.layers == counted != layout.kept


def check_for_a(adapter: Adapter, layout: Layout) -> None:
    """Raise an AdapterError if an adapter cannot be meant for the kept layers, under original indices.

    Trainers that save every layer leave B = 0 where nothing was trained; a dropped layer's B that is not zero says
    that the adapter was trained on other layers than those that A keeps.
    """
    if is_compact(adapter, layout):
        raise AdapterError(
            f"has tensors of layers {spans(adapter.layers)} and of no others, and A keeps layers"
            f" {spans(layout.kept)}: it counts the kept layers from 0",
            where=adapter.path,
            mend="say so with --adapter_indices compact (adapter_indices: compact in the configuration)",
        )
    for module, update in adapter.updates.items():
        layer = update.layer
        if layer is not None and layer in layout.dropped and update.b.read().count_nonzero():
            raise AdapterError(
                f"changes {module}, a layer that A runs without: it was trained on other layers than A's",
                where=adapter.path,
                mend=f"use an adapter that was trained for layers {spans(layout.kept)}, under their original indices",
            )


def part_of_adapter(adapter: Adapter, layout: Layout) -> str:
    """The part that an adapter is for: by its layers, or, where it has several parts', by its path.

    Raises:
        AdapterError: it has layers of several parts and its path names none, or it has no layer of this model.
    """
    layers = set(adapter.layers)
    if not layers & set(range(layout.num_layers)):
        raise AdapterError(f"has weights for none of the model's {layout.num_layers} layers", where=adapter.path)
    known = "A" if layout.unassigned else "ABC"
    inside = [part for part in known if layers <= set(layout.layers_of(part))]
    if inside:
        return inside[0]
    if is_compact(adapter, layout):
        return "A"
    for name in (adapter.path.name, *(parent.name for parent in adapter.path.parents)):
        match = _PART_IN_NAME.search(name)
        if match:
            return (match[1] or match[2]).upper()
    raise AdapterError(
        f"has weights for layers of several parts ({spans(adapter.layers)}), and its path does not say which one it is"
        " for",
        where=adapter.path,
        mend="name its directory A_lora, B_lora or C_lora",
    )


def open_adapters(paths: Sequence[str | Path], bases: Iterable[Path]) -> list[Adapter]:
    """Read adapters, each of which must be another one, and none of which the bases have merged already.

    Args:
        paths: adapter directories.
        bases: the directories of models and bundles that they go onto; their merge.json is asked.

    Raises:
        AdapterError: as `adapter.open_adapter`; the same weights twice.
        CheckpointError: a base is an exported stage whose layers were renumbered.
    """
    adapters, bases = [open_adapter(path) for path in paths], list(bases)
    seen: dict[str, Path] = {}
    _refuse_merged_before(adapters, bases)
    for base in bases:
        _refuse_renumbered(base)
    for adapter in adapters:
        if adapter.weights_sha256 in seen:
            raise _twice(
                f"has the weights of {seen[adapter.weights_sha256]}: the same adapter would count twice", adapter
            )
        seen[adapter.weights_sha256] = adapter.path
    return adapters


def _refuse_merged_before(adapters: Iterable[Adapter], bases: Iterable[Path]) -> None:
    """Raise an AdapterError if a base's merge.json says that one of the adapters is merged into it already."""
    told = {digest: base for base in bases for digest in merged_before(base)}
    for adapter in adapters:
        if adapter.weights_sha256 in told:
            base = told[adapter.weights_sha256]
            raise _twice(f"is merged into {base} already, as its merge.json says", adapter)


def _refuse_renumbered(base: Path) -> None:
    """Raise a CheckpointError if a model is an exported stage whose layers were given other numbers.

    An adapter speaks of original layers; what happens to have the same number here is another layer.
    """
    record = read_json_if_there(base / "export.json")
    original = record.get("original_index") if record else None
    if isinstance(original, Mapping) and any(str(old) != new for new, old in original.items()):
        raise CheckpointError(
            "is an exported stage whose layers have other numbers than in the dense model, and adapters go by those",
            where=base,
            mend="merge the adapters into the parts, and export the stage again",
        )


def _twice(what: str, adapter: Adapter) -> AdapterError:
    return AdapterError(what, where=adapter.path, mend="give each adapter once")


def merged_before(base: Path) -> dict[str, dict]:
    """What a directory's merge.json says of adapters merged into it and into what it was made from.

    Returns:
        The recorded adapters by the sha256 of their weights; {} for what no merge has written.
    """
    file = base / "merge.json"
    record = read_json_if_there(file)
    if record is None:
        return {}
    found = {}
    for entry in (*_listed(record, "merged_before"), *_listed(record, "adapters")):
        files = entry.get("files")
        digest = files.get(WEIGHTS_FILE) if isinstance(files, Mapping) else None
        if isinstance(digest, str):
            found[digest] = entry
    return found


def _listed(record: Mapping, key: str) -> list[dict]:
    entries = record.get(key)
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
