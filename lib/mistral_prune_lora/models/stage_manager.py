"""One model in memory that is switched between the stages A, AB and FULL: for generating text with each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.directories import bundle_layers
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.models.load import load_model, original_tensors, restore_layers
from mistral_prune_lora.models.pass_layer import PassLayer


@dataclass(frozen=True)
class _Versions:
    """A parameter, with its values as merged and as a bundle puts them back."""

    parameter: nn.Parameter
    merged: torch.Tensor
    original: torch.Tensor


class DynamicStageManager:
    """Loads an A model once and puts the layers of B and C in and out of it.

    A bundle is read when a stage first needs it and stays in memory, so switching back and forth costs nothing. Where
    it puts original tensors back, both those and the merged ones stay in memory.

    Attributes:
        model: the transformers model, at the current stage; use it as any other (`model.generate(...)`).
        layout: the layers of each part.
        stage: "A" after loading.
    """

    def __init__(
        self,
        model_dir: str | Path,
        bundles: Mapping[str, str | Path],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load the A model.

        Args:
            model_dir: an A model or merged A, with its manifest.
            bundles: bundle directories by part, "B" and "C"; those of the stages that will be asked for.
            dtype, device: of the model.

        Raises:
            CheckpointError: weights are missing or do not fit.
            LayoutError: the manifest leaves open what is B's and C's, and the bundles are not what A drops; parts of
                different prunings.
        """
        check_same_pruning([model_dir, *bundles.values()])
        self.model = load_model(model_dir, dtype=dtype, device=device)
        layout = open_checkpoint(model_dir).layout or Layout(self.model.config.num_hidden_layers)
        if layout.unassigned:
            layout = layout.assigned({p: bundle_layers(b) for p, b in bundles.items()}, where=model_dir)
        self.layout = layout
        self.stage = "A"
        self._model_dir, self._bundles = model_dir, dict(bundles)
        self._restored: dict[int, nn.Module] = {}
        self._original: dict[str, list[_Versions]] = {}

    def set_stage(self, stage: str) -> None:
        """Switch to "A", "AB" or "FULL".

        A KV cache belongs to the stage that filled it: start a new one after switching.

        Raises:
            LayoutError: no such stage, or a bundle that it needs was not given or holds other layers.
        """
        if stage not in PARTS_OF_STAGE:
            raise LayoutError(f"there is no stage {stage!r}", mend=f"Use one of {', '.join(PARTS_OF_STAGE)}")
        for part in PARTS_OF_STAGE[stage]:
            self._read(part)
        layers = self.model.model.layers
        active = set(self.layout.active(stage))
        for index in self.layout.dropped:
            layers[index] = self._restored[index] if index in active else PassLayer(index)
        for part, tensors in self._original.items():
            for each in tensors:
                each.parameter.data = each.original if part in PARTS_OF_STAGE[stage] else each.merged
        self.stage = stage

    def _read(self, part: str) -> None:
        """Bring a bundle into memory, unless it is there; the model stays as it is."""
        wanted = self.layout.layers_of(part)
        if part == "A" or not wanted or wanted[0] in self._restored:
            return
        if part not in self._bundles:
            raise LayoutError(
                f"bundle {part} was not given", where=self.model.name_or_path, mend=f"Give the {part} bundle"
            )
        bundle = open_checkpoint(self._bundles[part])
        if bundle.layers != wanted:
            raise LayoutError(
                f"holds layers {list(bundle.layers)} where the manifest gives {list(wanted)} to {part}",
                where=self._bundles[part],
                mend="Use the bundles that were cut from this model",
            )
        originals = original_tensors([*map(open_checkpoint, self._before(part)), bundle], self.model)
        restore_layers(self.model, bundle)
        parameters = {name: self._parameter(name) for name in originals}
        self._original[part] = [_Versions(p, p.data, originals[name]) for name, p in parameters.items()]
        for index in wanted:
            self._restored[index] = self.model.model.layers[index]
            self.model.model.layers[index] = PassLayer(index)

    def _before(self, part: str) -> list[str | Path]:
        """The directories of the parts that a bundle is restored beside."""
        bundles = [self._bundles[each] for each in "BC"[: "BC".index(part)] if self.layout.layers_of(each)]
        return [self._model_dir, *bundles]

    def _parameter(self, name: str) -> nn.Parameter:
        """A parameter by canonical name, of a layer too that is out of the model at this moment."""
        match = LAYER_PREFIX.match(name)
        if match and int(match[1]) in self._restored:
            return self._restored[int(match[1])].get_parameter(name[match.end() :])
        return self.model.get_parameter(name)
