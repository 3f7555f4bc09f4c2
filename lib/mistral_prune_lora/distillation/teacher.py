"""The teacher: the dense model's hidden states, out of files or computed as they are asked for, and its head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.distillation.batches import Batch
from mistral_prune_lora.distillation.teacher_record import open_teacher_states, teacher_record
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.models.four_bits import load_in_four_bits
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.text.windows import Windows

_LAYER = "make them with the teacher's states, or leave its states out"


@dataclass(frozen=True)
class TeacherFiles:
    """Where a teacher lies.

    Attributes:
        model_dir: the dense model.
        states: what `teacher_states` wrote for the same windows; without it the teacher's layers run along.
        layer_states: what `teacher_states` kept of the layer that is watched, if one is; only with `states`.
    """

    model_dir: str | Path
    states: str | Path | None = None
    layer_states: str | Path | None = None


class Teacher:
    """The dense model's answers to training windows.

    Attributes:
        digests: the sha256 of each of its weight files, by name.
        head: its output projection, shape (vocabulary, hidden).
        states, layer_states: its stored hidden states; None where its layers run along, or none is watched.
    """

    def __init__(
        self,
        files: TeacherFiles,
        windows: Windows,
        dtype: torch.dtype,
        device: torch.device | str,
        watched: int | None = None,
        four_bit: bool = False,
    ) -> None:
        """Open its states, or load it.

        Args:
            files: where it lies.
            windows: the training windows.
            dtype, device: of its weights.
            watched: a layer whose hidden states are asked for, too.
            four_bit: quantise it as it is loaded; it runs along then.

        Raises:
            DataError: the states belong to other windows or another teacher, or are of another dtype; those of the
                watched layer are not given.
            CheckpointError: weights are missing or do not fit.
            DeviceError: it cannot be quantised here.
        """
        record, self._watched = teacher_record(windows, files.model_dir), watched
        self.digests = record["teacher"]
        self.states = self.layer_states = None
        if files.states is None:
            load = load_in_four_bits if four_bit else load_model
            self._model = load(files.model_dir, dtype=dtype, device=device).requires_grad_(False)
            self.head = self._model.lm_head.weight
            if watched is not None and watched >= len(self._model.model.layers):
                raise DataError(f"has no layer {watched}", where="hidden.teacher_layer", mend="name one of its layers")
            return
        self.states = open_teacher_states(files.states, record, dtype)
        if watched is not None:
            if files.layer_states is None:
                raise DataError(
                    f"the states of the teacher's layer {watched} are not given", where=files.states, mend=_LAYER
                )
            self.layer_states = open_teacher_states(files.layer_states, record, dtype, layer=watched)
        checkpoint = open_checkpoint(files.model_dir)
        self.head = checkpoint.read(head_name(checkpoint), dtype).to(device)

    def same_head(self, head: torch.Tensor) -> torch.Tensor:
        """The teacher's head; another one that has its numbers stands for it, so that memory holds them once."""
        if head.shape == self.head.shape and torch.equal(head, self.head):
            self.head = head
        return self.head

    @torch.no_grad()
    def answer(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Its final hidden states of a batch after the norm, and those of the watched layer: (n, seqlen, hidden)."""
        if batch.taught is not None:
            return batch.taught, batch.taught_layer
        seen: list[torch.Tensor] = []
        hook = None
        if self._watched is not None:
            layer = self._model.model.layers[self._watched]
            hook = layer.register_forward_hook(lambda module, given, leaving: seen.append(leaving))
        try:
            final = self._model.model(batch.ids, position_ids=batch.positions, use_cache=False).last_hidden_state
        finally:
            if hook:
                hook.remove()
        return final, seen[0] if seen else None
