"""What a pruned model's directory says about its layers: manifest.json in every form it was ever written in.

The layers that A drops may stand in `stages.A.dropped_layers`, in `stages.B.removed_layers` and
`stages.C.removed_layers`, in `simdrop.removed_layers` or in `removed_layers`; one of them is enough. Where several
speak, they must agree with each other, with `stages.A.kept_layers` and with `counts`. Where none says which dropped
layers are B's and which C's, `split` of the prune_log.json beside it may; else the layout leaves it open.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_prune_lora.checkpoints.directories import is_layer_list, is_model_dir
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import MOST_LAYERS, Layout
from mistral_prune_lora.storage.json_file import read_json, read_json_if_there
from mistral_prune_lora.storage.plain_file import lies_there

MANIFEST, PRUNE_LOG = "manifest.json", "prune_log.json"
_KEPT, _B, _C = "stages.A.kept_layers", "stages.B.removed_layers", "stages.C.removed_layers"
_DROPPED = ("stages.A.dropped_layers", "simdrop.removed_layers", "removed_layers")
_DEPTH = "counts.L_full"


def read_manifest(path: str | Path) -> dict | None:
    """The manifest.json of a model directory as a dict, or None if it has none.

    Raises:
        LayoutError: the file is not a JSON object, or says nowhere which layers A drops.
    """
    manifest_path = Path(path) / MANIFEST
    manifest = read_json_if_there(manifest_path, LayoutError)
    if manifest is None:
        return None
    _dropped(manifest, manifest_path)
    return manifest


def read_layout(path: str | Path) -> Layout | None:
    """The layout of a model directory by its manifest, config.json and prune_log.json; None without a manifest.

    Raises:
        LayoutError: they cannot be read or contradict themselves or each other.
        CheckpointError: config.json is malformed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    count = read_config(folder)["num_hidden_layers"] if is_model_dir(folder) else None
    layout = layout_from_manifest(manifest, count, where=folder / MANIFEST)
    if count not in (None, layout.num_layers, len(layout.kept)):
        raise LayoutError(
            f"config.json counts {count} layers, the manifest {layout.num_layers}, of which A keeps {len(layout.kept)}",
            where=folder,
            mend="use the config.json and the manifest.json of one pruning",
        )
    log = folder / PRUNE_LOG
    if layout.unassigned and lies_there(log):
        layout = layout.assigned(logged_split(log), where=log)
        _check_counts(manifest, layout, folder / MANIFEST)
    return layout


def logged_split(log: Path) -> dict[str, list[int]]:
    """The layers of B and C as a prune_log.json gives them under `split`; without what it leaves open.

    Raises:
        LayoutError: the file is no JSON object, or its split is not made of lists of layer numbers.
    """
    split = read_json(log, LayoutError).get("split") or {}
    told = {part: split[part] for part in "BC" if split.get(part) is not None} if isinstance(split, dict) else None
    if told is None or not all(map(is_layer_list, told.values())):
        raise LayoutError("split holds no lists B and C of layer numbers, each once", where=log)
    return told


def layout_from_manifest(manifest: Mapping, num_layers: int | None = None, where: str | Path = MANIFEST) -> Layout:
    """The layout that a manifest describes.

    Args:
        manifest: a parsed manifest.json.
        num_layers: config.json's num_hidden_layers, for a manifest that does not say how many layers the dense model
            has: that many, or, if a dropped layer lies beyond them, that many kept ones.
        where: what errors call it.

    Raises:
        LayoutError: no layer count; statements that contradict each other.
    """
    source, dropped = _dropped(manifest, where)
    kept, b, c = (_layers(manifest, name, where) for name in (_KEPT, _B, _C))
    depth = _count(manifest, _DEPTH, where)
    if depth is None and kept is not None:
        depth = len(kept) + len(dropped)
    elif depth is None and num_layers is not None:
        depth = num_layers + (len(dropped) if dropped and dropped[-1] >= num_layers else 0)
    if depth is None:
        raise LayoutError(
            f"there is neither {_DEPTH} nor {_KEPT}: the dense model's layers are not counted",
            where=where,
            mend=f"write {_DEPTH} into the manifest",
        )
    if kept is not None and sorted(kept + dropped) != list(range(depth)):
        raise _contradiction(_KEPT, kept, f"{source} of {depth} layers", dropped, where)
    if b is None and c is None:
        layout = Layout(depth, unassigned=dropped)
    else:
        told = {part: layers for part, layers in (("B", b), ("C", c)) if layers is not None}
        layout = Layout(depth, unassigned=dropped).assigned(told, where)
    _check_counts(manifest, layout, where)
    return layout


def tells_depth(manifest: Mapping) -> bool:
    """Whether a manifest says by itself how many layers the dense model has."""
    return any(_value(manifest, name, MANIFEST) is not None for name in (_DEPTH, _KEPT))


def _dropped(manifest: Mapping, where: str | Path) -> tuple[str, tuple[int, ...]]:
    """(the key that says it, the layers that A drops, ascending); LayoutError if no key does or two disagree."""
    said = {name: layers for name in _DROPPED if (layers := _layers(manifest, name, where)) is not None}
    bundles = {name: layers for name in (_B, _C) if (layers := _layers(manifest, name, where)) is not None}
    if len(bundles) == 2 or (not said and bundles):
        # A layer of both stays twice in the list, which the layout refuses.
        said[" and ".join(bundles)] = tuple(sorted(i for layers in bundles.values() for i in layers))
    kept, depth = _layers(manifest, _KEPT, where), _count(manifest, _DEPTH, where)
    if not said and kept is not None and depth is not None:
        said[_KEPT] = tuple(i for i in range(depth) if i not in kept)
    if not said:
        raise LayoutError(
            f"says nowhere which layers A drops: {', '.join(_DROPPED)} and {_B} are missing",
            where=where,
            mend="prune the model again, or copy the manifest.json that pruning wrote",
        )
    (first, dropped), *others = said.items()
    for name, layers in others:
        if layers != dropped:
            raise _contradiction(first, dropped, name, layers, where)
    for name, layers in bundles.items():
        if not set(layers) <= set(dropped):
            raise _contradiction(first, dropped, name, layers, where)
    return first, dropped


def _check_counts(manifest: Mapping, layout: Layout, where: str | Path) -> None:
    lists = {"A_kept": ("the kept layers", layout.kept), "removed_total": ("the dropped layers", layout.dropped)}
    if not layout.unassigned:
        lists |= {"B": ("B's layers", layout.b), "C": ("C's layers", layout.c)}
    for key, (name, layers) in lists.items():
        count = _count(manifest, f"counts.{key}", where)
        if count not in (None, len(layers)):
            raise LayoutError(
                f"counts.{key} is {count}, but {name} are {list(layers)}",
                where=where,
                mend="use the manifest.json that pruning wrote",
            )


def _contradiction(one: str, layers: tuple, other: str, others: tuple, where: str | Path) -> LayoutError:
    return LayoutError(
        f"{one} is {list(layers)}, but {other} is {list(others)}",
        where=where,
        mend="use the manifest.json that pruning wrote, or strike out what is wrong",
    )


def _layers(manifest: Mapping, name: str, where: str | Path) -> tuple[int, ...] | None:
    value = _value(manifest, name, where)
    if value is not None and not is_layer_list(value):
        raise LayoutError(
            f"{name} is not a list of at most {MOST_LAYERS} layer numbers, each once",
            where=where,
            mend="prune the model again, or copy the manifest.json that pruning wrote",
        )
    return None if value is None else tuple(sorted(value))


def _count(manifest: Mapping, name: str, where: str | Path) -> int | None:
    value = _value(manifest, name, where)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_LAYERS):
        raise LayoutError(f"{name} is {value!r}, not a number of layers from 0 to {MOST_LAYERS}", where=where)
    return value


def _value(manifest: Mapping, name: str, where: str | Path) -> Any:
    """What stands under a dotted key; None if a part of it is missing or null."""
    value: object = manifest
    for depth, key in enumerate(name.split(".")):
        if not isinstance(value, Mapping):
            raise LayoutError(f"{'.'.join(name.split('.')[:depth])} is not a JSON object", where=where)
        value = value.get(key)
        if value is None:
            return None
    return value
