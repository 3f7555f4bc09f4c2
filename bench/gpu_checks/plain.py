"""What the checks are held against: the same models in transformers and PEFT alone, whole in memory, whole logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings


@dataclass(frozen=True)
class Step:
    """The loss of a training step and its gradients; what `training` and this module compare.

    Attributes:
        loss: summed over tokens: all of it, the divergence, the cross-entropy.
        gradients: of the summed loss by every trained parameter, on the CPU, by its name with original layer indices.
    """

    loss: tuple[float, float, float]
    gradients: dict[str, torch.Tensor]


def with_layers(dense: Path, layers: Sequence[int], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The dense model with some of its layers alone, counted from 0."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in layers)
    model.config.num_hidden_layers = len(layers)
    return model.to(device).eval()


@torch.inference_mode()
def evaluated(model: PreTrainedModel, ids: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model makes of windows.

    Args:
        model: on the device.
        ids: shape (windows, seqlen), on the CPU.
        batch: windows at once.

    Returns:
        The NLL of each window, float64, shape (windows,): cross-entropy in float32, sums in float64. And the final
        hidden states before the norm, shape (windows, seqlen, hidden), in the model's dtype. Both on the CPU.
    """
    nll, hidden = [], []
    hook = model.model.norm.register_forward_pre_hook(lambda module, given: hidden.append(given[0].cpu()))
    for rows in ids.long().to(model.device).split(batch):
        logits = model(rows, use_cache=False).logits[:, :-1]
        for each, targets in zip(logits, rows[:, 1:], strict=True):
            losses = functional.cross_entropy(each.float(), targets, reduction="none")
            nll.append(losses.double().sum().cpu())
    hook.remove()
    return torch.stack(nll), torch.cat(hidden)


def merged(base: Path, adapter: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """All weights after PEFT's `merge_and_unload` on a device, on the CPU; layers that were dropped are random."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell of every tensor of a dropped layer
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device)
        model = PeftModel.from_pretrained(model, adapter, torch_device=str(device)).merge_and_unload()
    finally:
        logging.set_verbosity(before)
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def trained(
    dense: Path, layers: Sequence[int], lora: LoraSettings, loss: LossSettings, ids: torch.Tensor, device: torch.device
) -> Step:
    """One step of a student of some layers beside the dense model, both in float32.

    Args:
        dense: the model.
        layers: of the student; all of them are adapted.
        lora, loss: as for a training of ours; the divergence is KL(teacher || student).
        ids: shape (n, seqlen), on the CPU, all in one forward pass.
        device: where to compute.
    """
    teacher = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).to(device)
    config = LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.target_modules))
    student = get_peft_model(with_layers(dense, layers, torch.float32, device), config)
    parameters = {_original(name, layers): p for name, p in student.named_parameters() if p.requires_grad}
    fill(parameters)
    rows = ids.long().to(device)
    with torch.no_grad():
        wanted = teacher(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
    given = student(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
    t, alpha = loss.temperature, loss.kd_alpha
    logs = [(logits / t).log_softmax(-1) for logits in (given, wanted)]
    divergence = functional.kl_div(*logs, log_target=True, reduction="sum")
    entropy = functional.cross_entropy(given, rows[:, 1:].flatten(), reduction="sum")
    whole = alpha * t * t * divergence + (1 - alpha) * entropy
    whole.backward()
    gradients = {name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None}
    return Step((whole.item(), divergence.item(), entropy.item()), gradients)


def fill(parameters: dict[str, torch.Tensor]) -> None:
    """Give an adapter's parameters numbers, in place: of a B of zeros, the gradient of A would be zero."""
    for number, name in enumerate(sorted(parameters)):
        draw = torch.Generator().manual_seed(number)
        tensor = parameters[name]
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.02)


def _original(name: str, layers: Sequence[int]) -> str:
    """A parameter's name with the index that its layer has in the dense model."""
    head, _, rest = name.partition(".layers.")
    number, _, tail = rest.partition(".")
    return f"{head}.layers.{layers[int(number)]}.{tail}"
