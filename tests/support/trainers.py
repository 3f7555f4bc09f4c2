"""Adapters rewritten as other trainers save them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def with_aliases(adapter: Path) -> Path:
    """Save every tensor under the three names that the layers are registered by."""

    tensors = load_file(adapter / WEIGHTS)
    for name in list(tensors):
        for alias in ("layers", "_canonical_layers"):
            copy = name.replace("base_model.model.model.layers.", f"base_model.model.{alias}.")
            tensors[copy] = tensors[name].clone()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    return adapter


def count_from_zero(adapter: Path, kept: tuple[int, ...]) -> Path:
    """Number the kept layers from 0, in the tensors and in the configuration, and leave the others out."""

    def renumbered(text: str) -> str | None:
        for new, old in enumerate(kept):
            for sign in (f"layers.{old}.", rf"layers\.{old}\."):
                if sign in text:
                    return text.replace(sign, sign.replace(str(old), str(new)))
        return None

    tensors = {renumbered(name): tensor for name, tensor in load_file(adapter / WEIGHTS).items() if renumbered(name)}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {renumbered(pattern): value for pattern, value in config[key].items()}
    config["layers_to_transform"] = list(range(len(kept)))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter
