"""Which tensors a model of each family has, and of what shapes: what its config.json asks for. Imports no torch.

Merging and pruning copy tensors without building a model, so a model that lacks a norm or an embedding would pass
through them unseen. They ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.checkpoints.tensor_names import EMBEDDING, HEAD, LAYER_PREFIX, NORM, layer_prefix
from mistral_prune_lora.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

# What transformers takes where a config.json is silent. A head_dim of None is hidden_size / num_attention_heads, a
# num_key_value_heads of None is num_attention_heads.
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_DEFAULTS: dict[str, dict[str, int | None]] = {
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": None},
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None, "head_dim": None},
    "qwen2": {**_QWEN, "head_dim": None},
    "qwen3": {**_QWEN, "head_dim": 128},
}
_COMMON: dict[str, int | None] = {"hidden_size": 4096, "num_attention_heads": 32}
_BUFFER = "rotary_emb.inv_freq"
_MEND = "fetch or write the model again"


@dataclass(frozen=True)
class FamilyTensors:
    """The tensors of a model, by shape.

    Attributes:
        outside: those around the layers, by canonical name; lm_head.weight only unless it is the embedding.
        layer: those of every decoder layer, by short name (`self_attn.q_proj.weight`).
        head: the shape of lm_head.weight, which a model may hold though it is tied.
    """

    outside: dict[str, tuple[int, ...]]
    layer: dict[str, tuple[int, ...]]
    head: tuple[int, ...]


def family_tensors(config: Mapping, where: str | Path) -> FamilyTensors:
    """The tensors that a model with this configuration has.

    Args:
        config: the content of config.json, of a family that is taken (see `families.check_family`).
        where: what the error calls it.

    Raises:
        CheckpointError: a size in it is not a positive number.
    """
    size = _sizes(config, where)
    family, hidden, inner = config["model_type"], size["hidden_size"], size["intermediate_size"]
    queries, keys = (size[key] * size["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    attention |= {"o_proj": (hidden, queries)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    biased: list[str] = []
    if family == "qwen2":
        biased = ["q_proj", "k_proj", "v_proj"]
    elif family in ("llama", "qwen3") and config.get("attention_bias"):
        biased = [*attention]
    if family == "llama" and config.get("mlp_bias"):
        biased += mlp
    layer: dict[str, tuple[int, ...]]
    layer = {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    for block, projections in (("self_attn", attention), ("mlp", mlp)):
        layer |= {f"{block}.{name}.weight": shape for name, shape in projections.items()}
        layer |= {f"{block}.{name}.bias": shape[:1] for name, shape in projections.items() if name in biased}
    if family == "qwen3":
        layer |= {f"self_attn.{name}.weight": (size["head_dim"],) for name in ("q_norm", "k_norm")}
    head = (size["vocab_size"], hidden)
    outside: dict[str, tuple[int, ...]] = {EMBEDDING: head, NORM: (hidden,)}
    return FamilyTensors(outside if config.get("tie_word_embeddings") else {**outside, HEAD: head}, layer, head)


def _sizes(config: Mapping, where: str | Path) -> dict[str, int]:
    """The sizes that shapes follow from; CheckpointError if one is no positive number."""
    size = {key: config.get(key, value) for key, value in {**_COMMON, **_DEFAULTS[config["model_type"]]}.items()}
    if size["num_key_value_heads"] is None:
        size["num_key_value_heads"] = size["num_attention_heads"]
    derived = size["head_dim"] is None
    if derived:
        del size["head_dim"]
    for key, value in size.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{key} is {value!r}, not a size", where=where, mend="Fetch the model again")
    return {**size, "head_dim": size["hidden_size"] // size["num_attention_heads"]} if derived else size


def check_model_tensors(config: Mapping, found: Shapes, layers: Iterable[int], where: str | Path) -> None:
    """Raise a CheckpointError unless a model has all tensors around its layers, and of each of some layers, in shape.

    What it has beyond them, such as the rotary buffers of old checkpoints, is not looked at.

    Args:
        config: as for `family_tensors`.
        found: the shapes of the tensors that are there, by canonical name under original layer indices.
        layers: the layers that it must hold.
        where: the model's directory.
    """
    wanted = family_tensors(config, Path(where) / "config.json")
    outside = {**wanted.outside, HEAD: wanted.head} if HEAD in found else wanted.outside
    _compare(outside, found, where)
    _check_layers(wanted, found, layers, where)


def check_layer_tensors(config: Mapping, found: Shapes, layers: Iterable[int], where: str | Path) -> None:
    """Raise a CheckpointError unless each of some layers has all its tensors, in shape.

    Args:
        config, found, layers: as for `check_model_tensors`.
        where: the directory that holds them.
    """
    _check_layers(family_tensors(config, where), found, layers, where)


def check_layers_alike(found: Shapes, layers: Iterable[int], where: str | Path) -> None:
    """Raise a CheckpointError unless layers have what all families have, and all that one of them has, in one shape.

    For a bundle without a configuration at hand. Rotary buffers of old checkpoints are not looked at.

    Args:
        found, layers: as for `check_layer_tensors`.
        where: the directory that holds them.
    """
    common = set.intersection(*(set(family_tensors({"model_type": family}, where).layer) for family in _DEFAULTS))
    held: dict[int, dict[str, tuple[int, ...]]] = {layer: {} for layer in layers}
    for name, shape in found.items():
        match = LAYER_PREFIX.match(name)
        if match and int(match[1]) in held and not name.endswith(_BUFFER):
            held[int(match[1])][name[match.end() :]] = tuple(shape)
    shapes = {short: shape for tensors in reversed(held.values()) for short, shape in tensors.items()}
    for layer in held:
        for short in sorted(common | set(shapes)):
            # What all layers lack has no shape to compare with: it is missing.
            _compare({layer_prefix(layer) + short: shapes.get(short, ())}, found, where, "in another layer")


def _check_layers(wanted: FamilyTensors, found: Shapes, layers: Iterable[int], where: str | Path) -> None:
    for layer in layers:
        _compare({layer_prefix(layer) + name: shape for name, shape in wanted.layer.items()}, found, where)


def _compare(wanted: Shapes, found: Shapes, where: str | Path, by: str = "by config.json") -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"has no tensor {name}", where=where, mend=_MEND)
        if tuple(found[name]) != shape:
            what = f"{name} has the shape {tuple(found[name])}, and {by} it is {shape}"
            raise CheckpointError(what, where=where, mend="use weights and a config.json of one model")
