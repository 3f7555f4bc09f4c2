"""LoRA adapters left unmerged: PEFT's own modules put around the projections of each streamed layer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.layout import Layout
from mistral_prune_lora.pruning.identity import PassLayer

_PREFIX = "base_model.model."
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PART_IN_NAME = re.compile(r"(?:^|[^a-z])(?:([abc])_?(?:lora|adapter)|stage_?([abc]))(?![a-z])", re.IGNORECASE)


class PeftAdapter:
    """One LoRA adapter directory, run beside the weights.

    Attributes:
        name: for labels; its directory's name.
        part: "A", "B" or "C", whose layers it is for; its weights for other layers are left out.
    """

    def __init__(self, path: str | Path, layout: Layout) -> None:
        """Read it.

        Raises:
            AdapterError: unreadable, not LoRA, changes something besides decoder layers, or is for no layer or no
                single part of this model.
        """
        self.path = Path(path).resolve()
        self.name = self.path.name
        try:
            self._config = PeftConfig.from_pretrained(str(self.path))
            weights = load_file(self.path / "adapter_model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdapterError(
                f"is not a PEFT adapter with safetensors weights: {str(error).splitlines()[0]}",
                where=path,
                mend="Give a directory with adapter_config.json and adapter_model.safetensors",
            ) from None
        if not isinstance(self._config, LoraConfig):
            raise AdapterError(f"is of type {self._config.peft_type}, not LoRA", where=path, mend="Give a LoRA adapter")
        self._config.inference_mode = True
        # As PEFT loads it: 16-bit adapters compute in float32.
        self._state = {
            name.removeprefix(_PREFIX): t.float() if t.dtype in (torch.bfloat16, torch.float16) else t
            for name, t in weights.items()
        }
        outside = [name for name in self._state if not _LAYER.match(name)]
        if outside:
            raise AdapterError(
                f"changes {outside[0]}, which is no decoder layer",
                where=path,
                mend="Merge it, and evaluate the merged model",
            )
        self.part = _part(self.path, {int(_LAYER.match(name)[1]) for name in self._state}, layout)
        self._layers = set(layout.layers_of(self.part))

    def digest(self, index: int) -> str:
        """The sha256 of the configuration and of the weights for one layer."""
        told = {key: value for key, value in self._config.to_dict().items() if "path" not in key}
        digest = hashlib.sha256(repr(sorted((k, repr(v)) for k, v in told.items())).encode())
        for name, tensor in sorted(self._of(index).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def _of(self, index: int) -> dict[str, torch.Tensor]:
        if index not in self._layers:
            return {}
        return {name: tensor for name, tensor in self._state.items() if name.startswith(f"model.layers.{index}.")}

    def wrap(self, layer: nn.Module, index: int) -> None:
        """Put the adapter around a built layer's projections, in place, beside those that are there already.

        Raises:
            AdapterError: it does not fit the layer.
        """
        state = self._of(index)
        if not state:
            return
        # PEFT resolves targets, ranks and scales by the module's name in the whole model.
        holder = nn.Module()
        holder.model = nn.Module()
        holder.model.layers = nn.ModuleList([*(PassLayer(i) for i in range(index)), layer])
        try:
            inject_adapter_in_model(self._config, holder, adapter_name=self._id)
            holder.peft_config = {self._id: self._config}
            faults = set_peft_model_state_dict(holder, state, adapter_name=self._id)
        except (RuntimeError, ValueError) as error:
            raise AdapterError(f"does not fit layer {index}: {error}", where=self.path) from None
        missing = [name for name in faults.missing_keys if f".{self._id}." in name]
        if missing or faults.unexpected_keys:
            raise AdapterError(
                f"does not fit layer {index}: missing {missing[:2]}, left over {faults.unexpected_keys[:2]}",
                where=self.path,
                mend="Give an adapter that was trained on this architecture",
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

    @property
    def _id(self) -> str:
        """A name that PEFT accepts as a module's, and that two adapters do not share."""
        return "a" + hashlib.sha256(str(self.path).encode()).hexdigest()[:12]


def open_adapters(paths: Sequence[str | Path], layout: Layout) -> dict[str, tuple[PeftAdapter, ...]]:
    """LoRA adapters by the part that they are for; several for one part add up.

    An adapter is for B or C if it has weights for that bundle's layers only, for A likewise. One with weights for more
    (training sometimes saves every layer) is told by its path: `B_lora`, `stageB`.

    Raises:
        AdapterError: as `PeftAdapter`.
    """
    adapters = [PeftAdapter(path, layout) for path in paths]
    return {
        part: tuple(a for a in adapters if a.part == part) for part in "ABC" if any(a.part == part for a in adapters)
    }


def _part(path: Path, layers: set[int], layout: Layout) -> str:
    if not layers & set(range(layout.num_layers)):
        raise AdapterError(f"has weights for none of the model's {layout.num_layers} layers", where=path)
    inside = [part for part in "ABC" if layers <= set(layout.layers_of(part))]
    if inside:
        return inside[0]
    for name in (path.name, *(parent.name for parent in path.parents)):
        match = _PART_IN_NAME.search(name)
        if match:
            return (match[1] or match[2]).upper()
    raise AdapterError(
        f"has weights for layers of several parts ({sorted(layers)}), and its path does not say which one it is for",
        where=path,
        mend="Name its directory A_lora, B_lora or C_lora",
    )
