"""The configuration of an exported stage: the dense model's, cut down to the layers that remain.

What the dense model's configuration says layer by layer is cut. What transformers works out from a layer's number when
it reads a configuration (Qwen2's `max_window_layers`, for one) is written out first, since a layer that remains may get
another number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.storage.dtypes import DTYPES, torch_name

_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
# Lists that may have as many entries as the model has layers by chance.
_NOT_PER_LAYER = re.compile(r"architectures|.*token.*|rope_scaling|rope_parameters")
# An interval says of layer numbers what a list says of layers. Without the list it is refused, beside it left out.
_INTERVALS = {
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
}
# These scale with depth, or count layers from one end: nothing that a list could say.
_OF_DEPTH = (
    "scale_depth",
    "scale_attn_by_inverse_layer_idx",
    "num_kv_shared_layers",
    "first_k_dense_replace",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "decoder_sparse_step",
)


@dataclass(frozen=True)
class StageConfig:
    """The content of a stage's config.json, and what was done to the dense model's.

    Attributes:
        content: what is written.
        cut: the lists of one entry a layer, by path: "layer_types", "attention.windows".
        written_out: those of them that the dense model's config.json left to transformers.
    """

    content: dict
    cut: tuple[str, ...]
    written_out: tuple[str, ...]


def stage_config(model: Checkpoint, layers: Sequence[int], *, tied: bool, dtypes: Sequence[str]) -> StageConfig:
    """The configuration under which stock software runs some layers of a model, numbered 0, 1, 2 ...

    Args:
        model: an A or dense checkpoint; its configuration is the dense model's.
        layers: the layers that remain, original indices, ascending.
        tied: whether the head is the embedding.
        dtypes: the safetensors dtype names that the weights are stored in; a single one is written down.

    Raises:
        CheckpointError: something depends on a layer's number in a way that cannot be written out, or a list has
            entries for some layers only.
    """
    count, where = model.config["num_hidden_layers"], model.path / "config.json"
    _refuse(model.config, count, whole=len(layers) == count, where=where)
    # transformers takes null for "work it out".
    told = model_config(model).to_dict()
    derived = {
        key: value for key, value in told.items() if model.config.get(key) is None and _is_per_layer(key, value, count)
    }
    content = dict(model.config)
    if len(layers) < count:
        content = {key: value for key, value in content.items() if key not in _INTERVALS}
        if isinstance(first := told.get("max_window_layers"), int):
            content["max_window_layers"] = sum(layer < first for layer in layers)
    cut: list[str] = []
    content = _cut(content | derived, layers, count, cut)
    content |= {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config["model_type"]]],
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": tied,
        "use_cache": True,
    }
    if len(dtypes) == 1:
        content |= dict.fromkeys(("dtype", "torch_dtype"), torch_name(DTYPES[dtypes[0]]))
    if "rope_parameters" in content:
        content |= _older_names(told["rope_parameters"])
    return StageConfig(dict(sorted(content.items())), tuple(cut), tuple(derived))


def _older_names(rope: Mapping) -> dict:
    """What transformers 5 writes as `rope_parameters`, under the names that software before it reads.

    It would not miss them: where no `rope_theta` says otherwise, it takes 10000.
    """
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaled = rope.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], **({"rope_scaling": scaling} if scaled else {})}


def _refuse(config: Mapping, count: int, *, whole: bool, where: Path) -> None:
    """Raise what `stage_config` raises. Of a `whole` model, no layer changes its number."""
    for key, value in config.items():
        listed = isinstance(value, list) and value and (key in _PER_LAYER or ("layer" in key and not whole))
        if listed and len(value) != count:
            raise CheckpointError(
                f"{key} has {len(value)} entries, and the dense model has {count} layers",
                where=where,
                mend="write an entry for every layer of the dense model there",
            )
    if whole:
        return
    for key, explicit in _INTERVALS.items():
        if config.get(key) and not _is_per_layer(explicit, config.get(explicit), count):
            raise CheckpointError(
                f"{key} goes by layer numbers, which change, and no {explicit} says it layer by layer",
                where=where,
                mend=f"write {explicit} with an entry for each of the {count} layers there",
            )
    for key in _OF_DEPTH:
        if config.get(key):
            raise CheckpointError(
                f"{key} lets layers depend on their number or on how many there are, which both change",
                where=where,
                mend="such a model cannot be exported as one of fewer layers",
            )


def _is_per_layer(key: str, value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and not _NOT_PER_LAYER.fullmatch(key)


def _cut(content: Mapping, layers: Sequence[int], count: int, cut: list[str], path: str = "") -> dict:
    """A configuration with its lists of one entry a layer cut, nested ones too; their paths are added to `cut`."""
    result = {}
    for key, value in content.items():
        if _is_per_layer(key, value, count):
            value = [value[layer] for layer in layers]
            cut.append(path + key)
        elif isinstance(value, Mapping) and not _NOT_PER_LAYER.fullmatch(key):
            value = _cut(value, layers, count, cut, f"{path}{key}.")
        result[key] = value
    return result
