"""The directory that a server loads stage by stage: A under its original layer indices, a file for B and one for C.

Beside them lie the descriptions such a server reads: `prune_log.json`, whose `split` says which layers come later, and
`layers_map.json`, which names the tensors of every layer that A holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mistral_prune_lora.checkpoint import LAYER_PREFIX
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout import Layout

STAGE_FILES = {"B": "stage2_layers_B.safetensors", "C": "stage3_layers_C.safetensors"}


def prune_log(model_dir: Path, layout: Layout) -> dict:
    """The content of prune_log.json: the model's own, with the `split` that the manifest gives where it has none.

    Raises:
        LayoutError: it is no JSON object, or its split is not the manifest's.
    """
    path = model_dir / "prune_log.json"
    try:
        log = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        split = log.get("split") or {
            "policy": "fixed",
            "ratio": len(layout.b) / len(layout.dropped),
            "B": list(layout.b),
            "C": list(layout.c),
        }
        told = tuple(tuple(sorted(split[part])) for part in "BC")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LayoutError(
            f"is no prune_log.json with a split into B and C: {error!r}",
            where=path,
            mend="delete it, and it is made from the manifest",
        ) from None
    if told != (layout.b, layout.c):
        raise LayoutError(
            f"gives {list(told[0])} to B and {list(told[1])} to C, the manifest {list(layout.b)} and {list(layout.c)}",
            where=path,
            mend="use the prune_log.json and the manifest.json of one pruning",
        )
    return {**log, "split": split}


def layers_map(names: Iterable[str], num_layers: int) -> dict:
    """The content of layers_map.json: every tensor by its layer, an empty list for a layer that is not there.

    Args:
        names: of A's tensors, with original layer indices.
        num_layers: of the dense model.
    """
    layers: dict[str, list[str]] = {str(layer): [] for layer in range(num_layers)}
    others = []
    for name in sorted(names):
        match = LAYER_PREFIX.match(name)
        (layers[match[1]] if match else others).append(name)
    return {
        "num_layers": num_layers,
        "layer_prefix": "model.layers.",
        "layers": layers,
        "non_layer_keys": others,
    }
