"""What A and the bundles say about themselves: manifest.json, layers_map.json, prune_log.json, bundle_meta.json.

Servers and trainers of other makers read these files, so their keys are fixed; see docs/file-formats.md. What a file
cannot know is null or left out. Nothing here writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mistral_prune_lora.checkpoints.directories import is_layer_list
from mistral_prune_lora.checkpoints.manifest import logged_split
from mistral_prune_lora.checkpoints.pruning_identity import KEY
from mistral_prune_lora.checkpoints.tensor_names import HEAD, LAYER_PREFIX, LAYERS
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage.json_file import read_json_if_there

MANIFEST_VERSION = "1.0"
_SEARCH = ("seed", "seqlen", "drop_frac", "keep_last_layer")
_FACTS = ("base_model", "arch", "model_type", "hidden_size", "num_hidden_layers")


def make_manifest(
    layout: Layout,
    *,
    base_model: str,
    model_type: str,
    selection: Mapping,
    artifacts: Mapping,
    identity: str | None = None,
) -> dict:
    """The manifest.json (version 1.0) of a pruned model.

    Args:
        layout: the layers of each part; where B and C are not known, the manifest leaves them out.
        base_model: path or repository id of the dense model.
        model_type: its config's model_type, which is also written as `arch`.
        selection: how the block was chosen: method, block {start, n}, angular_distance, keep_last_layer.
        artifacts: where A, B, C and original_config lie: {"A": {"dir": ...}, ...}.
        identity: of the pruning; None leaves it out.
    """
    bundles = {} if layout.unassigned else {"B": list(layout.b), "C": list(layout.c)}
    return {
        "version": MANIFEST_VERSION,
        "base_model": base_model,
        "arch": model_type,
        "model_type": model_type,
        "counts": {
            "L_full": layout.num_layers,
            "A_kept": len(layout.kept),
            "removed_total": len(layout.dropped),
            **{part: len(layers) for part, layers in bundles.items()},
        },
        "selection": dict(selection),
        "stages": {
            "A": {"kept_layers": list(layout.kept), "dropped_layers": list(layout.dropped)},
            **{part: {"removed_layers": layers} for part, layers in bundles.items()},
        },
        "artifacts": dict(artifacts),
        **({KEY: identity} if identity else {}),
    }


def layers_map(num_layers: int, names: Mapping[str, str]) -> dict:
    """The layers_map.json of a model: which keys of its weight files belong to which layer.

    Args:
        num_layers: layers of the dense model; one that is not here has an empty list.
        names: the model's tensors: what each is called in its file, by its name under its original layer index.
    """
    layers: dict[str, list[str]] = {str(i): [] for i in range(num_layers)}
    outside: list[str] = []
    for name, written in names.items():
        match = LAYER_PREFIX.match(name)
        (layers[match[1]] if match else outside).append(written)
    prefixes = (re.match(r"(.*?layers\.)\d+\.", key) for keys in layers.values() for key in keys)
    prefix = next((match[1] for match in prefixes if match), LAYERS)
    return {"num_layers": num_layers, "layer_prefix": prefix, "layers": layers, "non_layer_keys": outside}


def parameter_counts(layout: Layout, shapes: Mapping[str, Sequence[int]], *, tied: bool) -> dict:
    """`params` of a prune log: the parameters of the dense model and of the dropped layers.

    Args:
        layout: which layers are dropped.
        shapes: of the tensors that are here, by name under their original layer index. Of layers that are not here, the
            size is known if all that are here have one size.
        tied: whether the head is the embedding, which then counts once.

    Returns:
        P_total and P_drop; None where not known.
    """
    outside, layers = 0, dict.fromkeys(range(layout.num_layers), 0)
    for name, shape in shapes.items():
        match = LAYER_PREFIX.match(name)
        if name.endswith("rotary_emb.inv_freq") or (tied and name == HEAD):
            continue
        if match:
            layers[int(match[1])] += math.prod(shape)
        else:
            outside += math.prod(shape)
    sizes = {size for size in layers.values() if size}
    if 0 in layers.values() and len(sizes) != 1:
        return {"P_total": None, "P_drop": None}
    layers = {index: size or next(iter(sizes)) for index, size in layers.items()}
    return {"P_total": outside + sum(layers.values()), "P_drop": sum(layers[i] for i in layout.dropped)}


def make_prune_log(
    layout: Layout, *, model: str | None, params: Mapping, selection: Mapping, log: Mapping | None = None
) -> dict:
    """The prune_log.json of an A model.

    `selected_block.indices` are the dropped layers and `n` their number, searched for or not; `start` is null where
    they are not consecutive, so that nobody counts on from it. `split.B` and `split.C` are null where not known.

    Args:
        layout: the layers of each part.
        model: the dense model's name.
        params: as `parameter_counts` gives them.
        selection: how the layers were chosen, as the manifest has it.
        log: seed, seqlen, drop_frac, keep_last_layer and split {policy, ratio} of a search (null without one), and
            whatever else is to be kept.
    """
    log = dict(log or {})
    split, dropped = log.pop("split", {}), layout.dropped
    consecutive = bool(dropped) and dropped[-1] - dropped[0] + 1 == len(dropped)
    return {
        "model": model,
        **{key: log.pop(key, None) for key in _SEARCH},
        "selected_block": {
            "start": dropped[0] if consecutive else None,
            "n": len(dropped),
            "indices": list(dropped),
            "angular_distance": selection.get("angular_distance"),
        },
        "split": {
            "policy": split.get("policy"),
            "ratio": split.get("ratio"),
            "B": None if layout.unassigned else list(layout.b),
            "C": None if layout.unassigned else list(layout.c),
        },
        "params": dict(params),
        "method": selection.get("method"),
        **log,
    }


def carried_prune_log(path: Path, layout: Layout, made: Mapping) -> Mapping | Path:
    """The prune log of A for the model that A was merged into.

    Args:
        path: A's prune_log.json, which need not exist.
        layout: A's layers.
        made: a prune log of what the manifest and the weights tell; fills what the old one lacks.

    Returns:
        `path` if the file is to be copied as it is, else the content to write.

    Raises:
        LayoutError: the file is malformed, or speaks of other layers than the manifest.
    """
    old = read_json_if_there(path, LayoutError)
    if old is None:
        return made
    block = old.get("selected_block")
    told = {f"split.{part}": layers for part, layers in logged_split(path).items()}
    if isinstance(block, dict) and isinstance(block.get("indices"), list):
        told["selected_block.indices"] = block["indices"]
    known = {"selected_block.indices": layout.dropped, "split.B": layout.b, "split.C": layout.c}
    for key, layers in told.items():
        if not is_layer_list(layers) or sorted(layers) != list(known[key]):
            raise LayoutError(
                f"{key} is {layers}, but by the manifest it is {list(known[key])}",
                where=path,
                mend="use the prune_log.json and the manifest.json of one pruning, or take the log away",
            )
    full = _filled(old, made)
    return path if full == old else full


def _filled(old: Mapping, made: Mapping) -> dict:
    """An old object with the keys it lacks."""
    nested = {key for key in made if isinstance(made[key], Mapping) and isinstance(old.get(key), Mapping)}
    return {**made, **old, **{key: _filled(old[key], made[key]) for key in nested}}


def dense_facts(config: Mapping, layout: Layout | None, manifest: Mapping | None) -> dict:
    """What a bundle_meta.json says about the dense model, as far as a model's config.json and manifest tell."""
    facts = {
        "base_model": (manifest or {}).get("base_model"),
        "arch": config.get("model_type"),
        "model_type": config.get("model_type"),
        "hidden_size": config.get("hidden_size"),
        "num_hidden_layers": layout.num_layers if layout else config.get("num_hidden_layers"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def bundle_meta(part: str, layers: Sequence[int], facts: Mapping, identity: str) -> dict:
    """The bundle_meta.json of part "B" or "C" as pruned; `facts` as `dense_facts` gives them, and the identity."""
    stored = {"indices": list(layers), "format": "safetensors", "granularity": "layer"}
    return {"stage": part, **facts, **stored, KEY: identity}


def merged_bundle_meta(meta: Mapping, layers: Sequence[int], facts: Mapping, where: str | Path) -> dict:
    """The bundle_meta.json of a merged bundle: what the pruned one said, its layers under both names, `merged`.

    Args:
        meta: the pruned bundle's, {} if it has none.
        layers: the layers that are written.
        facts: what is known about the dense model from elsewhere; fills what `meta` lacks.
        where: the pruned bundle, for the error.

    Raises:
        LayoutError: `meta` is of another dense model.
    """
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        if key in meta and key in facts and meta[key] != facts[key]:
            raise LayoutError(
                f"{key} is {meta[key]!r} in bundle_meta.json and {facts[key]!r} in the A model",
                where=where,
                mend="use the bundle and the A model of one pruning",
            )
    about = {key: meta.get(key, facts.get(key)) for key in _FACTS if key in meta or key in facts}
    named = {"indices": list(layers), "layer_indices": list(layers)}
    return {**about, **meta, "format": "safetensors", "granularity": "layer", **named, "merged": True}
