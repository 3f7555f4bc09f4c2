"""LoRA adapters left unmerged: PEFT's own modules put around the projections of each streamed layer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from mistral_prune_lora.checkpoints.adapter import Adapter, Update, check_values
from mistral_prune_lora.checkpoints.adapter_scope import (
    check_for_a,
    from_compact,
    is_compact,
    open_adapters,
    part_of_adapter,
)
from mistral_prune_lora.checkpoints.tensor_names import HEAD_MODULE, layer_prefix
from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.pass_layer import PassLayer

_ROLES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


class _Holder(nn.Module):
    peft_config: dict[str, LoraConfig]  # torch takes every attribute of a module for a tensor or a module


class PeftAdapter:
    """One LoRA adapter, run beside the weights of one part's layers.

    Attributes:
        path: its directory.
        name: for labels; its directory's name.
        part: "A", "B" or "C", whose layers it is for; its weights for other layers are left out.
        out_of_scope: how many of its tensors are left out.
    """

    def __init__(self, adapter: Adapter, layout: Layout) -> None:
        """Take an adapter that was read.

        Raises:
            AdapterError: it changes something besides decoder layers, is for no layer or no single part of this model,
                or holds NaN or infinity.
        """
        self.path, self.name, self._adapter = adapter.path, adapter.path.name, adapter
        if HEAD_MODULE in adapter.updates:
            raise AdapterError(
                "changes lm_head, which is no decoder layer",
                where=adapter.path,
                mend="merge it, and evaluate the merged model",
            )
        self.part = part_of_adapter(adapter, layout)
        if self.part == "A" and layout.dropped:
            check_for_a(adapter, layout)
        self._layers = frozenset(layout.layers_of(self.part))
        inside = [update for update in adapter.updates.values() if update.layer in self._layers]
        self.out_of_scope = sum(len(u.entries) for u in adapter.updates.values() if u.layer not in self._layers)
        check_values(inside)

    def digest(self, index: int) -> str:
        """The sha256 of scalings, settings and weights for one layer."""
        told = [(u.module, u.scaling, self._adapter.config.use_dora) for u in self._inside(index)]
        digest = hashlib.sha256(repr(sorted(told)).encode())
        for name, tensor in sorted(self._state(index).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def wrap(self, layer: nn.Module, index: int) -> None:
        """Put the adapter around a built layer's projections, in place, beside those that are there already.

        Raises:
            AdapterError: it does not fit the layer, or says that it adapts a projection that it has no tensors for.
        """
        if index not in self._layers:
            return
        state = self._state(index)
        self._check_targets(layer, index)
        if not state:
            return
        # PEFT resolves names in the whole model.
        config, holder = self._config(index), _Holder()
        holder.model = nn.Module()
        holder.model.layers = nn.ModuleList([*(PassLayer(i) for i in range(index)), layer])
        try:
            inject_adapter_in_model(config, holder, adapter_name=self._id)
            holder.peft_config = {self._id: config}
            faults: Any = set_peft_model_state_dict(holder, state, adapter_name=self._id)
        except (RuntimeError, ValueError) as error:
            raise AdapterError(f"does not fit layer {index}: {error}", where=self.path) from None
        missing = [name for name in faults.missing_keys if f".{self._id}." in name]
        if missing or faults.unexpected_keys:
            raise AdapterError(
                f"does not fit layer {index}: missing {missing[:2]}, left over {faults.unexpected_keys[:2]}",
                where=self.path,
                mend="give an adapter that was trained on this architecture",
            )
        for module in layer.modules():
            if isinstance(module, LoraLayer):
                # Every adapter of the module at once, this one in float32 whatever dtype the layer has.
                for part in module.adapter_layer_names:
                    held = getattr(module, part)
                    if self._id in held and isinstance(held[self._id], nn.Module):
                        held[self._id].float()
                module.set_adapter(list(module.scaling))
        layer.eval().requires_grad_(False)

    def _check_targets(self, layer: nn.Module, index: int) -> None:
        """The merge's rule: PEFT would leave a random adapter where tensors are missing."""
        for name, module in layer.named_modules():
            full = layer_prefix(index) + name
            if isinstance(module, nn.Linear) and full not in self._adapter.updates and self._adapter.targets(full):
                raise AdapterError(
                    f"targets {full}, but holds no tensors for it",
                    where=self.path,
                    mend="train or copy the adapter again",
                )

    def _inside(self, index: int) -> list[Update]:
        """What it does to one layer."""
        if index not in self._layers:
            return []
        return [update for update in self._adapter.updates.values() if update.layer == index]

    def _config(self, index: int) -> LoraConfig:
        """A configuration for one layer that names every module: no pattern of the file's own is left to PEFT."""
        inside = {update.module: update for update in self._inside(index)}
        settings = self._adapter.config
        return LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=list(inside),
            rank_pattern={re.escape(name): update.a.shape[0] for name, update in inside.items()},
            alpha_pattern={re.escape(name): update.alpha for name, update in inside.items()},
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=settings.use_dora,
            inference_mode=True,
        )

    def _state(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors for one layer by PEFT's names; 16-bit ones in float32, as PEFT loads them."""
        state = {}
        for update in self._inside(index):
            for role, suffix in _ROLES.items():
                if (entry := getattr(update, role)) is not None:
                    tensor = entry.read()
                    half = tensor.dtype in (torch.bfloat16, torch.float16)
                    state[f"{update.module}.{suffix}"] = tensor.float() if half else tensor
        return state

    @property
    def _id(self) -> str:
        """A name that PEFT accepts as a module's, and that two adapters do not share."""
        return "a" + hashlib.sha256(str(self.path).encode()).hexdigest()[:12]


def open_peft_adapters(
    paths: Sequence[str | Path], layout: Layout, bases: Iterable[Path], adapter_indices: str = "original"
) -> dict[str, tuple[PeftAdapter, ...]]:
    """LoRA adapters by the part that they are for; several for one part add up.

    An adapter is for B or C if it has weights for that bundle's layers only, for A likewise. One with weights for more
    (training sometimes saves every layer) is told by its path: `B_lora`, `stageB`.

    Args:
        paths: adapter directories.
        layout: the model's parts.
        bases: the directories of the model and its bundles, which may have merged an adapter already.
        adapter_indices: "compact" if those for A count the layers that A keeps from 0.

    Raises:
        AdapterError: as `PeftAdapter` and `adapter_scope.open_adapters`; none of them is compact where that was said.
    """
    read = open_adapters(paths, bases)
    if adapter_indices == "compact":
        if not any(is_compact(adapter, layout) for adapter in read):
            raise AdapterError(
                f"none of these adapters counts the {len(layout.kept)} layers that A keeps from 0",
                where="--lora_paths",
                mend="leave --adapter_indices compact out",
            )
        read = [from_compact(adapter, layout) if is_compact(adapter, layout) else adapter for adapter in read]
    adapters = [PeftAdapter(adapter, layout) for adapter in read]
    return {
        part: tuple(a for a in adapters if a.part == part) for part in "ABC" if any(a.part == part for a in adapters)
    }
