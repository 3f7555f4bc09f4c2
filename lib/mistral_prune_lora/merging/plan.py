"""What a merge will do, decided from headers alone and checked in full before the first byte is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mistral_prune_lora.checkpoints.adapter import Adapter, Update, check_values
from mistral_prune_lora.checkpoints.adapter_scope import check_for_a, from_compact, open_adapters
from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.directories import is_model_dir, layer_file_name
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.family_tensors import check_layer_tensors, check_layers_alike, check_model_tensors
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning, read_identity
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.checkpoints.undo import UNDO_FILE, put_back
from mistral_prune_lora.errors import AdapterError, CheckpointError, LayoutError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.matching import check_fit, check_same_model, layout_of, split_updates
from mistral_prune_lora.merging.tensor_files import Item, TensorFiles, split_files
from mistral_prune_lora.merging.undo import UndoPlan, plan_undo
from mistral_prune_lora.storage.dtype_names import COMPUTE, FLOATS
from mistral_prune_lora.storage.safetensors_file import TensorEntry, TensorSpec


@dataclass(frozen=True)
class MergeSettings:
    """What a merge writes, and how it is made.

    Attributes:
        skeleton: for a bundle, the A model it belongs to; None means what the first adapter names as its base.
        save_bundle_only: write a model's kept layers as layer files.
        save_full_model: write skeleton and bundle as one model.
        max_shard_size: bytes in a weight file of a full model; None writes one file.
        adapter_indices: how the adapters count layers: "original", or "compact", from 0 over the layers that A keeps.
        output_dtype: "bf16", "fp16" or "fp32": what every float tensor of the base is cast to before anything is added;
            None leaves each in its own dtype.
        undo_of: for a bundle, the part that it puts back in its original bytes: its directory before the merge, and
            after it; None puts nothing back.
    """

    skeleton: str | Path | None = None
    save_bundle_only: bool = False
    save_full_model: bool = False
    max_shard_size: int | None = None
    adapter_indices: str = "original"
    output_dtype: str | None = None
    undo_of: tuple[str | Path, str | Path] | None = None


@dataclass(frozen=True)
class MergePlan(TensorFiles):
    """Everything a merge does.

    Attributes:
        kind: "model" or "bundle": what is written.
        base: what the adapters are merged into.
        skeleton: the A model that a bundle is restored into; None where no such thing is written.
        adapters: in the order they are merged.
        files: for each output file, its tensors.
        layers: layers whose weights are written.
        layout: the parts as the manifest says them; None without one.
        out_of_scope: adapter tensors that belong to no layer of this target, by adapter directory.
        frame: the A model that a bundle belongs to; None for a model, or where nothing names it.
        identity: of the pruning that everything written is of; None where a part of it carries none.
        output_dtype: what all float tensors are cast to first: "bf16", "fp16" or "fp32"; None leaves each as it is.
        undo: what the bundle puts back; it is written beside the layers.
    """

    kind: str
    base: Checkpoint
    skeleton: Checkpoint | None
    adapters: tuple[Adapter, ...]
    files: dict[str, list[Item]]
    layers: tuple[int, ...]
    layout: Layout | None
    out_of_scope: dict[str, list[str]] = field(default_factory=dict)
    frame: Path | None = None
    identity: str | None = None
    output_dtype: str | None = None
    undo: UndoPlan | None = None

    @property
    def parts(self) -> list[Checkpoint]:
        """What the tensors are read from."""
        return [self.base, *([self.skeleton] if self.skeleton else [])]


def plan_merge(
    base_model: str | Path,
    adapter_paths: Sequence[str | Path],
    settings: MergeSettings,
) -> MergePlan:
    """Decide what to write and match every adapter tensor to a weight, or list it as out of scope.

    Args: as for `merge.merge_adapters`.

    Raises:
        PipelineError: contradicting flags; no adapter.
        AdapterError: an adapter that cannot be merged, matches nothing here, was trained for another model or other
            layers, or comes twice.
        CheckpointError, LayoutError: base or skeleton cannot be read or contradict each other.
    """
    if not adapter_paths and not settings.undo_of:
        raise PipelineError("no adapter is given", where="--adapter_path", mend="name at least one adapter directory")
    if settings.save_bundle_only and settings.save_full_model:
        raise PipelineError("a bundle only and a full model exclude each other", mend="give one of the two flags")
    base = open_checkpoint(base_model)
    adapters = tuple(open_adapters(adapter_paths, [base.path]))
    bundle = settings.save_bundle_only or (base.kind == "bundle" and not settings.save_full_model)
    undo = plan_undo(base, settings.undo_of) if base.kind == "bundle" and bundle else None
    if settings.undo_of and not undo:
        raise PipelineError(
            "only a bundle puts tensors back", where="--undo_of", mend="give it when a bundle is merged"
        )
    frame = None
    if base.kind == "bundle":
        frame = _find_skeleton(settings.skeleton, adapters, required=settings.save_full_model)
    if base.kind == "model":
        layout, num_layers = base.layout, base.config["num_hidden_layers"]
    else:
        layout, num_layers = layout_of(frame) if frame else (None, None)
        if (
            layout
            and not settings.skeleton
            and not settings.save_full_model
            and not set(base.layers) & set(layout.dropped)
        ):
            layout = None  # an adapter's base that has these layers itself says nothing about the bundle
    scope = _scope(base, layout, frame)
    # An adapter's base that says nothing about the bundle is no part that the bundle goes with.
    beside = frame if settings.skeleton or layout else None
    _check_tensors(base, scope, beside)
    if settings.adapter_indices == "compact":
        adapters = _from_compact(adapters, base, layout)
    for adapter in adapters:
        check_same_model(adapter, layout, num_layers)
        if base.kind == "model" and layout:
            check_for_a(adapter, layout)
    updates, out_of_scope = _match(base, adapters, scope, whole=not bundle)
    sources = {name: entry for name, entry in base.entries.items() if _belongs(name, scope, bundle)}
    opened = None
    if frame is not None and not bundle:  # a bundle, and the model that it goes into
        opened = put_back([open_checkpoint(frame), base])[0]
        check_model_tensors(opened.config, opened.shapes, layout.kept if layout else opened.layers, opened.path)
        sources = {name: entry for name, entry in opened.entries.items() if _kept(name, layout)} | sources
    # A bundle's tensors carry no layer prefix of their own, and a skeleton may count only its kept layers; a model's
    # tensors keep the names they had.
    renamed = base.kind == "bundle"
    if bundle:
        files = _bundle_files(sources, updates, settings.output_dtype)
    else:
        files = _model_files(sources, updates, settings.output_dtype, settings.max_shard_size, renamed)
    layers = tuple(sorted({int(m[1]) for m in map(LAYER_PREFIX.match, sources) if m}))
    files |= {UNDO_FILE: undo.items} if undo else {}
    kind = "bundle" if bundle else "model"
    common = check_same_pruning([base.path, beside])
    identity = read_identity(base.path) if opened is None else common
    dtype = settings.output_dtype
    return MergePlan(kind, base, opened, adapters, files, layers, layout, out_of_scope, frame, identity, dtype, undo)


def _from_compact(adapters: Sequence[Adapter], base: Checkpoint, layout: Layout | None) -> tuple[Adapter, ...]:
    """Adapters that count A's kept layers from 0, under original indices."""
    if base.kind != "model" or layout is None:
        raise AdapterError(
            "compact indices count the layers that a pruned A keeps, and the base is no such model",
            where=base.path,
            mend="leave --adapter_indices compact out (adapter_indices in the configuration)",
        )
    return tuple(from_compact(adapter, layout) for adapter in adapters)


def _find_skeleton(given, adapters: Sequence[Adapter], *, required: bool) -> Path | None:
    """The A model that a bundle belongs to: the given one, or what an adapter names as its base."""
    named = given or next((a.base_model for a in adapters if a.base_model and is_model_dir(a.base_model)), None)
    if named and is_model_dir(named):
        return Path(os.path.abspath(named))
    if given or required:
        raise CheckpointError(
            f"{named or (adapters and adapters[0].base_model) or 'no model'} is not the directory of an A model",
            where="--skeleton" if given or not adapters else adapters[0].path / "adapter_config.json",
            mend="give the A model that the bundle was cut from with --skeleton",
        )
    return None


def _scope(base: Checkpoint, layout: Layout | None, frame: Path | None) -> frozenset[int]:
    """The layers that may be changed: A's kept layers, or the bundle's own."""
    if base.kind == "model":
        dropped = layout.dropped if layout else ()
        missing = [i for i in range(base.config["num_hidden_layers"]) if i not in dropped and i not in base.layers]
        if missing:
            raise CheckpointError(
                f"has no weights of layers {missing}, and no manifest.json says that they were dropped",
                where=base.path,
                mend="use the A directory that pruning wrote, with its manifest.json",
            )
        return frozenset(base.layers) - frozenset(dropped)
    if not base.layers:
        raise LayoutError("this bundle holds no layers", where=base.path, mend="there is nothing to merge into it")
    strays = sorted(set(base.layers) - set(layout.dropped)) if layout else []
    if strays:
        raise LayoutError(
            f"layers {strays} of the bundle are not dropped layers of {frame}",
            where=base.path,
            mend="use the bundle and the A model of one pruning; name that A model with --skeleton",
        )
    return frozenset(base.layers)


def _check_tensors(base: Checkpoint, scope: frozenset[int], frame: Path | None) -> None:
    """Raise a CheckpointError if the base lacks a tensor that its family has, or one is of another shape."""
    layers = sorted(scope)
    if base.kind == "model":
        check_model_tensors(base.config, base.shapes, layers, base.path)
    elif frame:
        check_layer_tensors(read_config(frame), base.shapes, layers, base.path)
    else:
        check_layers_alike(base.shapes, layers, base.path)


def _match(base: Checkpoint, adapters: Sequence[Adapter], scope: frozenset[int], *, whole: bool):
    """(updates by weight name in merge order, tensors out of scope by adapter).

    Args:
        whole: whether what lies outside of layers (lm_head) is in scope too.
    """
    updates: dict[str, list[Update]] = {}
    out_of_scope: dict[str, list[str]] = {}
    outside = whole and base.kind == "model"
    for adapter in adapters:
        inside, left_out = split_updates(adapter, scope, outside=outside)
        if left_out:
            out_of_scope.setdefault(os.fspath(adapter.path), []).extend(left_out)
        check_fit(base, adapter, inside, scope, outside=outside)
        check_values(inside.values())
        for name, update in inside.items():
            updates.setdefault(name, []).append(update)
    return {name: tuple(chain) for name, chain in updates.items()}, out_of_scope


def _belongs(name: str, scope: frozenset[int], bundle: bool) -> bool:
    """Whether a tensor of the base is written: layers in scope, and, for a full model, what is outside of layers."""
    match = LAYER_PREFIX.match(name)
    return int(match[1]) in scope if match else not bundle


def _kept(name: str, layout: Layout | None) -> bool:
    match = LAYER_PREFIX.match(name)
    return not match or layout is None or int(match[1]) in layout.kept


def _bundle_files(sources: Mapping[str, TensorEntry], updates, output_dtype: str | None) -> dict[str, list[Item]]:
    files: dict[str, list[Item]] = {}
    for name, entry in sources.items():
        if match := LAYER_PREFIX.match(name):  # nothing else belongs to a bundle
            items = files.setdefault(layer_file_name(int(match[1])), [])
            items.append(_item(name[match.end() :], entry, updates.get(name, ()), output_dtype))
    return dict(sorted(files.items()))


def _model_files(
    sources: Mapping[str, TensorEntry], updates, output_dtype: str | None, max_shard_size: int | None, renamed: bool
) -> dict[str, list[Item]]:
    """The files of a full model.

    Args:
        renamed: give tensors their canonical names instead of the ones they had.
    """
    items = [
        _item(name if renamed else entry.stored_name, entry, updates.get(name, ()), output_dtype)
        for name, entry in sources.items()
    ]
    return split_files(items, max_shard_size)


def _item(name: str, entry: TensorEntry, updates: tuple[Update, ...], output_dtype: str | None) -> Item:
    dtype = _cast_dtype(entry, output_dtype) if output_dtype else entry.dtype
    return Item(TensorSpec(name, dtype, entry.shape), entry, updates)


def _cast_dtype(entry: TensorEntry, output_dtype: str) -> str:
    """The dtype of a tensor after the cast, as from_pretrained(dtype=) casts: floats become it, other numbers stay."""
    if entry.dtype in ("F64", *FLOATS):
        return COMPUTE[output_dtype]
    if entry.dtype.startswith("F8") or len(entry.shape) > 1:
        raise CheckpointError(
            f"{entry.stored_name} is stored as {entry.dtype}: quantised weights are not cast here",
            where=entry.file,
            mend="leave --output_dtype out, or merge into the unquantised model",
        )
    return entry.dtype
