"""Whole models in memory: A with PassLayers where layers were dropped, bundles restored into it.

What needs a runnable `PreTrainedModel` (distillation, generation, adapters left unmerged) starts here. Perplexity does
not: it streams layers (see the package streaming).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.family_tensors import check_layer_tensors, check_model_tensors
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning
from mistral_prune_lora.checkpoints.tensor_names import HEAD
from mistral_prune_lora.checkpoints.undo import UNDO_FILE, put_back
from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.models.architecture import empty_layer, renew_rotary_embedding
from mistral_prune_lora.models.config import generation_config, head_name, model_config
from mistral_prune_lora.models.pass_layer import PassLayer


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bundles: tuple[str | Path, ...] = (),
    first_layer: int = 0,
) -> PreTrainedModel:
    """Load a model directory with PassLayers at its dropped layers and the layers of `bundles` restored.

    `from_pretrained` would fill the dropped layers with random weights and only print a report. Here every parameter
    of every active layer comes from the checkpoint, or loading fails.

    Args:
        path: a dense model, an A model (dropped layers taken from its manifest) or a merged A.
        dtype: of all parameters.
        device: where they go.
        bundles: bundle directories to restore, B before C; what they put back in other parts is put back.
        first_layer: layers below it are not read; PassLayers stand for them, too. For who has the hidden states that
            enter this layer.

    Returns:
        The model in eval mode, with its original layer indices and `name_or_path` set to `path`.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape; a file is not what its record says was
            written.
        LayoutError: a bundle's layer is not one that the model dropped; parts of different prunings.
    """
    check_same_pruning([path, *bundles])
    checkpoint, *restored = put_back([open_checkpoint(each) for each in (path, *bundles)])
    config = model_config(checkpoint)
    checkpoint.check_files()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layers = model.model.layers
    for index in set(range(len(layers))) - set(checkpoint.layers):
        if checkpoint.layout is None or index not in checkpoint.layout.dropped:
            raise CheckpointError(
                f"has no weights of layer {index}, and no manifest.json says that it was dropped",
                where=checkpoint.path,
                mend="fetch the model again, or put the manifest.json that pruning wrote beside it",
            )
    for index in {*range(first_layer), *(checkpoint.layout.dropped if checkpoint.layout else ())}:
        layers[index] = PassLayer(index)
    active = [index for index, layer in enumerate(layers) if not isinstance(layer, PassLayer)]
    check_model_tensors(checkpoint.config, checkpoint.shapes, active, checkpoint.path)
    wanted = set(model.state_dict())
    tied = head_name(checkpoint) != HEAD
    state = {name: checkpoint.read(name, dtype).to(device) for name in checkpoint.entries if name in wanted}
    _assign(model, state, checkpoint)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    renew_rotary_embedding(model.model, device)
    model.name_or_path = config._name_or_path = os.fspath(path)
    if (generation := generation_config(checkpoint.path)) is not None:
        model.generation_config = generation
    for bundle in restored:
        restore_layers(model, bundle, first_layer)
    return model.eval()


def restore_bundle(model: PreTrainedModel, path: str | Path) -> tuple[int, ...]:
    """Put a bundle's layers in place of the model's PassLayers, in the model's dtype and device; returns their indices.

    Original tensors that the bundle brings along are put back in the model.

    Raises:
        LayoutError: a layer of the bundle is not one that the model runs without; the bundle is of another pruning than
            the model, or than what was restored into it before.
        CheckpointError: a tensor is missing or of the wrong shape; a file is not what its record says was written.
    """
    bundle = open_checkpoint(path)
    check_same_pruning([model.name_or_path or None, *getattr(model, "restored_from", ()), bundle.path])
    before = [open_checkpoint(each) for each in getattr(model, "restored_from", ())]
    model_dir = [open_checkpoint(model.name_or_path)] if model.name_or_path else []
    originals = original_tensors([*model_dir, *before, bundle], model)
    layers = restore_layers(model, bundle)
    for name, tensor in originals.items():
        model.get_parameter(name).data = tensor
    return layers


def original_tensors(parts: Sequence[Checkpoint], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the last of the parts puts back in the others, in a model's dtype and on its device, by canonical name.

    Args:
        parts: the model's own directory, the bundles that are restored into it, and the one that is to be.
        model: in memory.

    Raises:
        CheckpointError: as `undo.put_back`.
    """
    file = parts[-1].path / UNDO_FILE
    entries = {name: entry for part in put_back(parts) for name, entry in part.entries.items() if entry.file == file}
    return {name: entry.read().to(model.dtype).to(model.device) for name, entry in entries.items()}


def restore_layers(model: PreTrainedModel, bundle: Checkpoint, first_layer: int = 0) -> tuple[int, ...]:
    """As `restore_bundle`, of a bundle of the model's pruning; layers below the first are not read."""
    bundle.check_files()
    for index in (layer for layer in bundle.layers if layer >= first_layer):
        if index >= len(model.model.layers) or not isinstance(model.model.layers[index], PassLayer):
            raise LayoutError(
                f"layer {index} of the bundle is not a dropped layer of {model.name_or_path}",
                where=bundle.path,
                mend="use the bundles that were cut from this model",
            )
        layer = build_layer(model.config, index, bundle, model.dtype, model.device)
        model.model.layers[index] = layer.train(model.training)
    restored = (*getattr(model, "restored_from", ()), bundle.path)
    model.restored_from = restored  # type: ignore[assignment]  # torch: every attribute is a tensor or a module
    return bundle.layers


def build_layer(
    config: PreTrainedConfig, index: int, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """One decoder layer of the model's own class with weights from a model or bundle checkpoint, in eval mode.

    Args:
        config: the model's configuration; decides class and geometry.
        index: original layer index, which the layer keeps as its `layer_idx` for a KV cache.
        checkpoint: where its tensors lie.
        dtype, device: of its parameters.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape.
    """
    layer, entries = empty_layer(config, index), checkpoint.layer(index)
    check_layer_tensors(config.to_dict(), checkpoint.shapes, [index], checkpoint.path)
    _assign(layer, {name: entry.read().to(dtype).to(device) for name, entry in entries.items()}, checkpoint)
    return layer.eval().requires_grad_(False)


def _assign(module: nn.Module, state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Give a module made on the meta device its tensors; CheckpointError unless names and shapes agree exactly."""
    try:
        faults = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"does not fit its configuration: {error}", where=checkpoint.path) from None
    missing = [name for name in faults.missing_keys if name != HEAD]
    if missing or faults.unexpected_keys:
        raise CheckpointError(
            f"does not fit its configuration: missing {missing[:3]}, left over {faults.unexpected_keys[:3]}",
            where=checkpoint.path,
            mend="use a checkpoint of the same architecture",
        )
