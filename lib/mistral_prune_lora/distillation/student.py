"""The student: the model that a part's adapter is trained on, and the fresh adapter on that part's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.directories import bundle_layers
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning
from mistral_prune_lora.distillation.settings import LoraSettings
from mistral_prune_lora.errors import AdapterError, CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import Layout


@dataclass(frozen=True)
class Student:
    """The directories that a student is made of.

    Attributes:
        model_dir: the A model for part A, else the merged A.
        bundles: what is restored into it: for B its bundle; for C the merged B and then C's bundle.
    """

    model_dir: str | Path
    bundles: tuple[str | Path, ...] = ()

    def checkpoint(self) -> Checkpoint:
        """The model; CheckpointError if its directory does not say which layers it runs without."""
        checkpoint = open_checkpoint(self.model_dir)
        self._layout_of(checkpoint)
        return checkpoint

    def _layout_of(self, checkpoint: Checkpoint) -> Layout:
        if checkpoint.layout is None:
            raise CheckpointError(
                "there is no manifest.json", where=self.model_dir, mend="give an A model or a merged A"
            )
        return checkpoint.layout

    def layers(self, part: str) -> tuple[int, ...]:
        """The layers that the adapter of part "A", "B" or "C" is trained on.

        Raises:
            LayoutError: the part holds no layers; the bundles do not restore what the part's student has, or are of
                another pruning.
            CheckpointError: as for `checkpoint`.
        """
        layout = self._layout(part)
        layers = layout.layers_of(part)
        if not layers:
            raise LayoutError(f"{part} holds no layers", where="manifest.json", mend="there is nothing to train for it")
        self._check_restored(part, layout)
        check_same_pruning([self.model_dir, *self.bundles])
        return layers

    def _layout(self, part: str) -> Layout:
        """The layout, with B and C told by the bundles that are restored where the manifest leaves them open."""
        layout = self._layout_of(open_checkpoint(self.model_dir))
        if not layout.unassigned:
            return layout
        # From the end: C's student has one bundle where B holds no layers.
        parts = reversed("BC"[: "ABC".index(part)])
        held = {part: bundle_layers(bundle) for part, bundle in zip(parts, reversed(self.bundles), strict=False)}
        return layout.assigned(held, where="--bundle")

    def _check_restored(self, part: str, layout: Layout) -> None:
        """Raise a LayoutError unless the bundles restore exactly the layers that the part's student has."""
        restored = {layer for bundle in self.bundles for layer in open_checkpoint(bundle).layers}
        wanted = {layer for other in "BC"[: "ABC".index(part)] for layer in layout.layers_of(other)}
        if restored != wanted:
            raise LayoutError(
                f"the student of part {part} restores layers {sorted(wanted)}, the bundles hold {sorted(restored)}",
                where="--bundle",
                mend={
                    "A": "give no bundle for part A",
                    "B": "give bundle B for part B, and no other",
                    "C": "give the merged bundle B and bundle C for part C",
                }[part],
            )


def with_adapter(student: PreTrainedModel, layers: Sequence[int], lora: LoraSettings) -> PeftModel:
    """The student with a fresh adapter on some layers; nothing else can be trained.

    Raises:
        AdapterError: a target module is not a projection of the layers, which PEFT would pass over in silence.
    """
    modules = student.model.layers[layers[0]].named_modules()
    known = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    unknown = sorted(set(lora.target_modules) - known)
    if unknown:
        raise AdapterError(
            f"there are no modules {', '.join(unknown)} in the layers",
            where="target_modules",
            mend=f"use some of {', '.join(sorted(known))}",
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank; its annotation says int
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        layers_to_transform=list(layers),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, config)
