"""The student in memory with a fresh adapter, and windows on their way through it to the final norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from mistral_prune_lora.distillation.batches import Batch
from mistral_prune_lora.distillation.projections import write_out_gradients
from mistral_prune_lora.distillation.settings import LoraSettings, TrainingSettings
from mistral_prune_lora.distillation.staged import StagedDecoder
from mistral_prune_lora.distillation.start import StartAdapter
from mistral_prune_lora.distillation.student import Student, matching_modules
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.streaming.compute import Compute


class AdaptedStudent:
    """The student with a fresh adapter.

    Attributes:
        model: PEFT's; its frozen weights are in the compute dtype, the adapter's in float32.
        trained: the adapter's parameters.
        head: the output projection, shape (vocabulary, hidden).
    """

    def __init__(
        self,
        student: Student,
        layers: Sequence[int],
        settings: TrainingSettings,
        compute: Compute,
        *,
        with_prefix: bool = True,
        start: StartAdapter | None = None,
    ) -> None:
        """Load it and add the adapter, whose first weights come from the seed.

        Args:
            student: where its weights lie.
            layers: that get an adapter.
            settings: the adapter's shape, the seed, whether activations are recomputed.
            compute: device and dtype.
            with_prefix: whether the layers below the first adapted one are needed; without them, batches must bring
                what enters that layer.
            start: an adapter to start from, merged into the weights.

        Raises:
            CheckpointError, LayoutError: as for `load_model`.
            AdapterError: as for `with_adapter`.
        """
        first = 0 if with_prefix else min(layers)
        model = load_model(
            student.model_dir, dtype=compute.dtype, device=compute.device, bundles=student.bundles, first_layer=first
        )
        if start:
            start.merge_into(model)
        # Dropout is in adapters alone; what is frozen gives the same at every pass.
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0  # type: ignore[assignment]  # torch: attributes are tensors or modules
        torch.manual_seed(settings.seed)
        self.model: PeftModel = with_adapter(model, layers, settings.lora)
        write_out_gradients(model)
        if settings.gradient_checkpointing:
            # Reentrant checkpointing would need inputs that require gradients: a backward pass below the adapter.
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._whole, watched = model, settings.loss.hidden
        self._watched = None if watched is None else watched.student_layer
        self.head: torch.Tensor = model.lm_head.weight
        self._staged = StagedDecoder(model.model, student.layout, list(settings.stages)) if settings.stages else None
        self._shares = [share / sum(settings.stages.values()) for share in settings.stages.values()]

    def finals(self, batch: Batch) -> tuple[list[tuple[float, torch.Tensor]], torch.Tensor | None]:
        """As `hidden`, with the final hidden states at every stage that is trained, each with its share of the loss.

        Returns:
            One pair, with a share of 1, unless several stages are trained; and what leaves the watched layer.
        """
        if self._staged is None:
            final, watched = self.hidden(batch)
            return [(1.0, final)], watched
        found = self._staged({"input_ids": batch.ids}, batch.positions)
        return list(zip(self._shares, found, strict=True)), None

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The final hidden states after the norm, and those that leave the watched layer, if any is watched.

        Of layers below the first adapted one nothing is kept for a backward pass: nothing there can be trained.

        Returns:
            Shape (n, seqlen, hidden) each.
        """
        watched: list[torch.Tensor] = []
        hook = None
        if self._watched is not None:
            layer = self._whole.model.layers[self._watched]
            hook = layer.register_forward_hook(lambda module, given, leaving: watched.append(leaving))
        entering = {"input_ids": batch.ids} if batch.entering is None else {"inputs_embeds": batch.entering}
        try:
            final = self._whole.model(**entering, position_ids=batch.positions, use_cache=False).last_hidden_state
        finally:
            if hook:
                hook.remove()
        return final, watched[0] if watched else None


def with_adapter(student: PreTrainedModel, layers: Sequence[int], lora: LoraSettings) -> PeftModel:
    """The student with a fresh adapter on some layers; nothing else can be trained.

    Raises:
        AdapterError: a target module is not a projection of the layers, which PEFT would pass over in silence.
    """
    modules = student.model.layers[layers[0]].named_modules()
    known = [name for name, module in modules if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank; its annotation says int
        lora_dropout=lora.dropout,
        target_modules=matching_modules(lora.target_modules, known, "target_modules"),
        layers_to_transform=list(layers),
        rank_pattern=_spread(lora.rank_pattern, known, "rank_pattern"),
        alpha_pattern=_spread(lora.alpha_pattern, known, "alpha_pattern"),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, config)


def _spread(values: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    """Values by pattern as values by module; of two patterns for one module the later one counts."""
    return {name: value for pattern, value in values.items() for name in matching_modules([pattern], known, where)}
