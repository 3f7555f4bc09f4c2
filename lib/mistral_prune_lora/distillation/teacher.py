"""The teacher: the dense model's final hidden states, out of a file or computed as they are asked for, and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.distillation.teacher_record import open_teacher_states, teacher_record
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.text.windows import Windows


@dataclass(frozen=True)
class TeacherFiles:
    """Where a teacher lies.

    Attributes:
        model_dir: the dense model.
        states: what `teacher_states` wrote for the same windows; without it the teacher's layers run along.
    """

    model_dir: str | Path
    states: str | Path | None = None


class Teacher:
    """The dense model's answers to training windows.

    Attributes:
        digests: the sha256 of each of its weight files, by name.
        head: its output projection, shape (vocabulary, hidden).
    """

    def __init__(self, files: TeacherFiles, windows: Windows, dtype: torch.dtype, device: torch.device | str) -> None:
        """Open its states, or load it.

        Args:
            files: where it lies.
            windows: the training windows.
            dtype, device: of its weights.

        Raises:
            DataError: the states belong to other windows or another teacher, or are of another dtype.
            CheckpointError: weights are missing or do not fit.
        """
        record, self._device, self._windows = teacher_record(windows, files.model_dir), device, windows
        self.digests = record["teacher"]
        self._states = open_teacher_states(files.states, record, dtype) if files.states else None
        if self._states is None:
            self._model = load_model(files.model_dir, dtype=dtype, device=device).requires_grad_(False)
            self.head = self._model.lm_head.weight
        else:
            checkpoint = open_checkpoint(files.model_dir)
            self.head = checkpoint.read(head_name(checkpoint), dtype).to(device)

    @torch.no_grad()
    def hidden(self, chosen: Sequence[int]) -> torch.Tensor:
        """Final hidden states of some windows after the norm, shape (n, seqlen, hidden)."""
        if self._states is None:
            ids = self._windows.ids[list(chosen)].long().to(self._device)
            return self._model.model(ids, use_cache=False).last_hidden_state
        return torch.cat([self._states.read(i, i + 1) for i in chosen]).to(self._device)
