"""Which model families are taken, decided where a model's config.json is read. Imports no torch.

Whoever opens a model reads its config.json here, so a model that is not taken is refused before any work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.layout.partition import MOST_LAYERS
from mistral_prune_lora.storage.json_file import read_json

# What they have in common, and what the streamed run, the merge and the stages rest on: the embedding goes into the
# first layer and the last layer into norm and head without further scaling; layers hand each other hidden states alone;
# all weights of a layer lie under its own index.
FAMILIES = ("mistral", "llama", "qwen2", "qwen3")
# Rotary embeddings that these families compute, and what each needs to be told. Those that depend on the length of the
# sequence (dynamic, longrope) ask for it when they run, so a streamed run gives them what the whole model does.
_ROTARY = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
_NESTED = ("text_config", "vision_config", "audio_config")
_SUPPORTED = (
    f"Use a text model of one of the families {', '.join(FAMILIES)}, run by transformers' own code, its weights not"
    " quantised"
)
_AS_IT_STANDS = f"Use a model of one of the families {', '.join(FAMILIES)} whose config.json its family's code follows"


def read_config(path: str | Path) -> dict:
    """The parsed config.json of a model directory.

    Raises:
        CheckpointError: missing, not a JSON object with num_hidden_layers, or of a family that is not taken.
    """
    config_path = Path(path) / "config.json"
    config = read_json(config_path, CheckpointError, mend="Fetch the model again")
    check_family(config, config_path)
    return config


def check_family(config: Mapping, where: str | Path) -> None:
    """Raise a CheckpointError if a model's parsed config.json is of a family that is not taken.

    Refused too is what transformers would pass over within a family that is taken: it would run, with other numbers.

    Args:
        config: the content of config.json.
        where: the file, for the error.
    """
    if fault := _kind_fault(config):
        raise CheckpointError(fault, where=where, mend=_SUPPORTED)
    if fault := _rotary_fault(config) or _attention_fault(config):
        raise CheckpointError(fault, where=where, mend=_AS_IT_STANDS)
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers is {count!r}, not a number of layers from 1 to {MOST_LAYERS}",
            where=where,
            mend="Fetch the model again",
        )


def _kind_fault(config: Mapping) -> str | None:
    """What makes a model one of another kind, in words."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return f"the model_type {family!r} is not one that is supported"
    nested = [key for key in _NESTED if config.get(key)]
    if nested:
        return f"there is a {nested[0]}: this is more than a text model"
    if config.get("auto_map"):
        return "there is an auto_map: the model brings code of its own"
    if config.get("quantization_config"):
        return "there is a quantization_config: the weights are quantised"
    heads = config.get("architectures") or ()
    if not _is_words(heads) or not all(name.endswith("ForCausalLM") for name in heads):
        return f"the architectures are {heads!r}: this is no causal language model"
    if config.get("is_causal") is False:
        return "is_causal is false: tokens would see those that they predict"
    return None


def _rotary_fault(config: Mapping) -> str | None:
    """What is wrong with the rotary embedding, in words."""
    # Of both, transformers takes the older key.
    told = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(told, Mapping):
        return f"the rotary embedding is {told!r}, not an object"
    kind = told.get("rope_type", told.get("type", "default"))
    known = isinstance(kind, str) and kind in _ROTARY
    if not known or any(isinstance(value, Mapping) for value in told.values()):
        name = "of another kind for each kind of layers" if known else f"of type {kind!r}"
        return f"the rotary embedding is {name}, not of one of the types {', '.join(_ROTARY)}"
    missing = [key for key in _ROTARY[kind] if told.get(key) is None]
    if missing:
        return f"the rotary embedding of type {kind!r} has no {missing[0]}"
    share = told.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if share != 1:
        return f"partial_rotary_factor is {share}, and this family rotates whole heads"
    return None


def _attention_fault(config: Mapping) -> str | None:
    """What is wrong with the kinds of attention of the layers, in words."""
    kinds, width = config.get("layer_types"), config.get("sliding_window")
    if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
        return f"sliding_window is {width!r}, not a number of tokens"
    if kinds is None:
        return None
    if not _is_words(kinds) or not set(kinds) <= set(_KINDS_OF_LAYERS):
        return f"layer_types are not all of {', '.join(_KINDS_OF_LAYERS)}"
    if len(kinds) != config.get("num_hidden_layers"):
        return f"there are {len(kinds)} layer_types and num_hidden_layers is {config.get('num_hidden_layers')}"
    family, window = config["model_type"], config.get("sliding_window", "the family's own")
    if family.startswith("qwen"):
        # Their layers differ as the list says; the window is there only with its switch on.
        if "sliding_attention" in kinds and (window is None or not config.get("use_sliding_window")):
            return "layer_types has sliding_attention, and no sliding window is switched on"
        return None
    # Their code never looks at the list: all layers slide, or none.
    done = "sliding_attention" if family == "mistral" and window is not None else "full_attention"
    if set(kinds) != {done}:
        return f"layer_types asks for more than {done}, which is what every layer of this {family} has"
    return None


def _is_words(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(word, str) for word in value)
