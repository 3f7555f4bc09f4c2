"""The adapter that a training starts from, such as one in closed form.

While it is trained on, it is merged into the student's weights, and a fresh adapter beside it learns what is left. What
is written is one adapter that does both: LoRA's factors side by side, at a rank that is the sum of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mistral_prune_lora.checkpoints.adapter import WEIGHTS_FILE, Adapter, check_values, open_adapter
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.distillation.settings import LoraSettings
from mistral_prune_lora.distillation.student import Student, matching_modules
from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.merging.arithmetic import Factors
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.json_file import read_json, write_json

_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class StartAdapter:
    """A LoRA adapter to start from.

    Attributes:
        adapter: as it lies on disk.
    """

    adapter: Adapter

    @classmethod
    def open(cls, path: str | Path, student: Student, layers: Sequence[int], lora: LoraSettings) -> StartAdapter:
        """Read it, and check that a training with these settings can go on from it.

        Args:
            path: its directory.
            student: what is trained.
            layers: that get an adapter.
            lora: the shape of the fresh adapter.

        Raises:
            AdapterError: it cannot be read, holds NaN or infinity, is a DoRA, or changes something that the training
                leaves alone.
        """
        adapter = open_adapter(path)
        if adapter.config.use_dora or lora.use_dora:
            raise AdapterError(
                "with DoRA, two adapters of one weight do not add up",
                where=adapter.path,
                mend="start from a LoRA, and train one",
            )
        checkpoints = {source.index: source.checkpoint for source in student.sources()}
        shapes = {name: entry.shape for name, entry in checkpoints[layers[0]].layer(layers[0]).items()}
        known = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        trained = _whole_names(matching_modules(lora.target_modules, known, "target_modules"), known)
        apart = _whole_names(matching_modules([*lora.rank_pattern, *lora.alpha_pattern], known, "rank_pattern"), known)
        for update in adapter.updates.values():
            match = LAYER_PREFIX.match(update.module)
            name = update.module[match.end() :] if match else update.module
            if update.layer not in layers or name not in trained:
                raise AdapterError(
                    f"changes {update.module}, which this training does not adapt",
                    where=adapter.path,
                    mend="adapt that layer and module too (adapt_layers, target_modules)",
                )
            if name in apart:
                raise AdapterError(
                    f"changes {update.module}, whose rank or alpha a pattern sets",
                    where=adapter.path,
                    mend="leave rank_pattern and alpha_pattern out for it",
                )
            if update.shape != shapes[f"{name}.weight"]:
                told = f"{update.module} is {shapes[f'{name}.weight']}, and the adapter is for {update.shape}"
                raise AdapterError(told, where=adapter.path, mend="give an adapter of this model")
        check_values(adapter.updates.values())
        return cls(adapter)

    @property
    def record(self) -> dict:
        """What identifies it."""
        config = file_sha256(self.adapter.path / _CONFIG)
        return {"weights_sha256": self.adapter.weights_sha256, "config_sha256": config}

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Add it to a model's weights, as a merge does."""
        for update in self.adapter.updates.values():
            weight = model.get_submodule(update.module).get_parameter("weight").data
            Factors.load(update, weight.device).add_to(weight, slice(None))

    def join(self, folder: Path) -> None:
        """Put it into the adapter that was trained beside it, where that lies.

        The trained factors keep their scaling and their bits; those of this one are scaled to it.
        """
        trained, config = open_adapter(folder), read_json(folder / _CONFIG)
        tensors = load_file(folder / WEIGHTS_FILE)
        for update in self.adapter.updates.values():
            beside = trained.updates[update.module]
            names = [entry.stored_name for entry in (beside.a, beside.b)]
            factors = Factors.load(update, torch.device("cpu"))
            tensors[names[0]] = torch.cat([tensors[names[0]], factors.a])
            scaled = factors.b * (update.scaling / beside.scaling)
            tensors[names[1]] = torch.cat([tensors[names[1]], scaled], dim=1)
            rank = len(tensors[names[0]])
            config["rank_pattern"][update.module] = rank
            # Of which PEFT makes the scaling that the trained factors had.
            divided = math.sqrt(rank) if config.get("use_rslora") else rank
            config["alpha_pattern"][update.module] = beside.scaling * divided
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        write_json(folder / _CONFIG, config)


def _whole_names(patterns: Sequence[str], known: Sequence[str]) -> set[str]:
    """The modules that PEFT's names speak of: each by its name in the layer."""
    return {name for name in known for pattern in patterns if name == pattern or name.endswith(f".{pattern}")}
