"""A model's configuration as transformers takes it, held against the weights that lie beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.tensor_names import EMBEDDING, HEAD, layer_prefix
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.storage.json_file import read_json_if_there

_AGAIN = "Fetch the model again"


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers configuration of a model checkpoint, with the dense model's layer count.

    Raises:
        CheckpointError: a bundle; transformers cannot use it; or the weights are of other shapes than it says.
    """
    if checkpoint.kind != "model":
        raise CheckpointError("is a bundle, not a model", where=checkpoint.path, mend="give the A model's directory")
    try:
        config = _made(checkpoint.config)
        _first_layer(json.dumps(checkpoint.config))
    except Exception as error:  # its validators raise half a dozen unrelated kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"is no configuration that transformers takes: {first}",
            where=checkpoint.path / "config.json",
            mend=_AGAIN,
        ) from None
    _check_shapes(checkpoint)
    config._attn_implementation = "sdpa"
    return config


def _made(settings: Mapping) -> PreTrainedConfig:
    own = copy.deepcopy(dict(settings))  # transformers writes into the dicts that it is given
    return CONFIG_MAPPING[own.pop("model_type")](**own)


@cache
def _first_layer(settings: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of a model with this configuration, as JSON, but of one layer only.

    To make it is the only way to learn whether its code can use every number and word of the configuration.
    """
    content = json.loads(settings)
    content |= {"num_hidden_layers": 1}
    if content.get("layer_types"):
        content |= {"layer_types": content["layer_types"][:1]}
    config = _made(content)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_shapes(checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError unless what surrounds the layers, and the first layer there is, have the right shapes.

    Every layer is checked when it is built. What is made of the configuration before that, such as a rotary embedding,
    would otherwise be as large as a wrong number says.
    """
    expected = _first_layer(json.dumps(checkpoint.config))
    first = next(iter(checkpoint.layers), 0)
    for name, shape in expected.items():
        entry = checkpoint.entries.get(name.replace(layer_prefix(0), layer_prefix(first)))
        if entry is not None and entry.shape != shape:
            raise CheckpointError(
                f"{entry.stored_name} has the shape {entry.shape}, and by config.json it is {shape}",
                where=checkpoint.path,
                mend="use weights and config.json of one model",
            )


def generation_config(folder: Path) -> GenerationConfig | None:
    """A model directory's generation_config.json, None if it has none; CheckpointError if it cannot be used."""
    path = folder / "generation_config.json"
    settings = read_json_if_there(path, CheckpointError)
    try:
        return None if settings is None else GenerationConfig.from_dict(settings)
    except Exception as error:  # as for the model's own configuration
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"is none that transformers takes: {first}", where=path, mend=_AGAIN) from None


def head_name(checkpoint: Checkpoint) -> str:
    """The tensor that a model projects with: lm_head.weight, or the embedding where they are tied and it is absent."""
    tied = model_config(checkpoint).tie_word_embeddings and HEAD not in checkpoint.entries
    return EMBEDDING if tied else HEAD
