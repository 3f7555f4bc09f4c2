"""What the scripts that this pipeline grew out of do with a directory, and how they write one: readers and writers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from mistral_prune_lora.layout.partition import Layout


def read(folder: Path, name: str) -> dict:
    """A description of a directory."""
    return json.loads((folder / name).read_text())


def trainers_split(served: Path) -> tuple[list[int], list[int]]:
    """The trainer and the server take B and C from the log in the directory that they load, and die without it."""
    log = read(served, "prune_log.json")
    return log["split"]["B"], log["split"]["C"]


def trainers_indices(bundle: Path) -> list[int]:
    """The trainer of C takes the layers of a bundle under this one name, and nothing for none."""
    return sorted(read(bundle, "bundle_meta.json").get("indices", []))


def installed_pass_layers(model: Path) -> list[int]:
    """The trainer switches layers off by the first of these that says something."""
    manifest = read(model, "manifest.json")
    stages = manifest.get("stages", {})
    return sorted(
        manifest.get("simdrop", {}).get("removed_layers")
        or manifest.get("removed_layers")
        or stages.get("A", {}).get("dropped_layers")
        or [i for part in "BC" for i in stages.get(part, {}).get("removed_layers", [])]
    )


def keys_by_map(model: Path) -> dict[int, set[str]]:
    """The keys of each layer by layers_map.json, every one of which, with the others, must be in the weights."""
    listed = read(model, "layers_map.json")
    assert set(listed) == {"num_layers", "layer_prefix", "layers", "non_layer_keys"}
    assert list(listed["layers"]) == [str(i) for i in range(listed["num_layers"])]
    keys = {int(layer): set(names) for layer, names in listed["layers"].items()}
    for names in keys.values():
        assert all(name.startswith(listed["layer_prefix"]) for name in names)
    with safe_open(model / "model.safetensors", "pt") as weights:
        stored = set(weights.keys())
    assert set(listed["non_layer_keys"]).union(*keys.values()) == stored
    return keys


def unpad(bundle: Path) -> None:
    """Name a bundle's layers as an older writer did: layer_21.safetensors."""
    for file in bundle.glob("layer_*.safetensors"):
        file.rename(file.with_name(f"layer_{int(file.stem[6:])}.safetensors"))


def old_manifests(layout: Layout) -> dict[str, dict]:
    """The manifests that older writers left, by what they know; "split" marks those that tell B from C."""
    dropped, stages = list(layout.dropped), {p: {"removed_layers": list(layout.layers_of(p))} for p in "BC"}
    return {
        "simdrop": {"base_model": "dense", "simdrop": {"removed_layers": dropped, "angular_distance": 0.1}},
        "top level": {"base_model": "dense", "removed_layers": dropped, "stages": None},
        "split, no A": {"base_model": "dense", "stages": stages},
        "split, no C": {"base_model": "dense", "removed_layers": dropped, "stages": {"B": stages["B"]}},
        "split, kept": {
            "counts": {"L_full": layout.num_layers},
            "stages": {"A": {"kept_layers": list(layout.kept)}, **stages},
        },
    }
