"""What a merged model or bundle says about itself, decided before the first byte of it is written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.descriptions import (
    carried_prune_log,
    dense_facts,
    layers_map,
    make_manifest,
    make_prune_log,
    merged_bundle_meta,
    parameter_counts,
)
from mistral_prune_lora.checkpoints.directories import BUNDLE_META, INDEX_FILE, LAYERS_MAP
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG, read_manifest
from mistral_prune_lora.checkpoints.pruning_identity import KEY
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.plan import MergePlan
from mistral_prune_lora.merging.tensor_files import shard_index
from mistral_prune_lora.storage.json_file import read_json_if_there


def describe_merge(plan: MergePlan) -> dict[str, Mapping | Path]:
    """The descriptions of a merge's output by file name: an object to write, or a file to copy.

    A model that was pruned keeps manifest.json and prune_log.json as they are, what an old log lacks filled in; where a
    bundle's layers have become layers of the model, both tell of the new state. layers_map.json is always made anew
    from the tensors that are written. A model without a manifest was not pruned and has none of them.

    Raises:
        LayoutError: a file that is carried over is malformed or contradicts the manifest.
    """
    if plan.kind == "bundle":
        return {BUNDLE_META: _bundle_meta(plan)}
    described: dict[str, Mapping | Path] = {}
    model = plan.skeleton or plan.base
    if plan.skeleton and model.config != read_config(model.path):
        # A skeleton that counts only its kept layers: the restored model counts all of them.
        described["config.json"] = model.config
    if index := shard_index(plan.files):
        described[INDEX_FILE] = index
    manifest = read_manifest(model.path)
    if manifest is None or model.layout is None:
        return described
    names = _written_names(plan)
    described[LAYERS_MAP] = layers_map(model.layout.num_layers, names)
    layout = model.layout.without(plan.layers) if plan.skeleton else model.layout
    made = _prune_log(plan, model, manifest, layout)
    if plan.skeleton:
        described[MANIFEST] = _with_restored(manifest, model, layout, plan.identity)
        log = model.path / PRUNE_LOG
        before = read_json_if_there(log, LayoutError)
        described[PRUNE_LOG] = {**made, "restored": {"layers": list(plan.base.layers), "prune_log_before": before}}
    else:
        described[MANIFEST] = model.path / MANIFEST
        described[PRUNE_LOG] = carried_prune_log(model.path / PRUNE_LOG, layout, made)
    if layout.unassigned:
        print(
            f"{model.path}: nothing says which of layers {list(layout.unassigned)} are B's and which C's;"
            f" {PRUNE_LOG} leaves its split open (null). Stages B and C in {MANIFEST} would say it.",
            file=sys.stderr,
        )
    return described


def _bundle_meta(plan: MergePlan) -> dict:
    base, source = plan.base, plan.base.path / BUNDLE_META
    if base.kind == "model":
        facts = dense_facts(base.config, base.layout, read_manifest(base.path))
    elif plan.frame and plan.layout:
        facts = dense_facts(read_config(plan.frame), plan.layout, read_manifest(plan.frame))
    else:
        facts = {}
    meta = (read_json_if_there(source, LayoutError) if base.kind == "bundle" else None) or {}
    if plan.identity:
        meta = {**meta, KEY: plan.identity}
    described = merged_bundle_meta(meta, plan.layers, facts, base.path)
    if plan.undo:
        described |= plan.undo.described()
    return described


def _written_names(plan: MergePlan) -> dict[str, str]:
    """What each tensor of the output is called there, by its name under its original layer index."""
    checkpoints = [part for part in (plan.base, plan.skeleton) if part]
    original = {entry: name for part in checkpoints for name, entry in part.entries.items()}
    return {original[item.entry]: item.spec.name for item in plan.items}


def _prune_log(plan: MergePlan, model: Checkpoint, manifest: Mapping, layout: Layout) -> dict:
    """A prune log of what the manifest and the weights tell."""
    selection = {} if plan.skeleton else manifest.get("selection") or {}
    checkpoints = [part for part in (plan.base, plan.skeleton) if part]
    shapes = {name: entry.shape for part in checkpoints for name, entry in part.entries.items()}
    params = parameter_counts(layout, shapes, tied=bool(model.config.get("tie_word_embeddings")))
    log = {"keep_last_layer": selection.get("keep_last_layer")}
    return make_prune_log(layout, model=manifest.get("base_model"), params=params, selection=selection, log=log)


def _with_restored(manifest: Mapping, model: Checkpoint, layout: Layout, identity: str | None) -> dict:
    """The skeleton's manifest after the bundle's layers have become layers of A; of the same pruning, if both are."""
    return make_manifest(
        layout,
        base_model=manifest.get("base_model", ""),
        model_type=model.config.get("model_type", ""),
        selection=manifest.get("selection", {}),
        artifacts=manifest.get("artifacts", {}),
        identity=identity,
    )
