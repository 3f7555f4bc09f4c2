"""What a training reads: windows, what is stored of them, and the teacher's answers; made where it is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from mistral_prune_lora.distillation.batches import Shelf
from mistral_prune_lora.distillation.prefix import open_prefix, prefix_sources, prefix_states
from mistral_prune_lora.distillation.ranks import Ranks
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher import Teacher, TeacherFiles
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.distillation.unfinished import HELD_OUT_PREFIX, HELD_OUT_TEACHER, PREFIX, Unfinished
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class TrainingData:
    """Windows, and what is stored of them.

    Attributes:
        windows: the token ids.
        teacher_states, layer_states: the teacher's final hidden states, and those of the watched layer, in files; None
            runs the teacher along.
        prefix_states: what enters the first adapted layer, in a file; None computes it where it is needed.
    """

    windows: Windows
    teacher_states: str | Path | None = None
    layer_states: str | Path | None = None
    prefix_states: str | Path | None = None

    @property
    def files(self) -> tuple[str | Path | None, ...]:
        """The files."""
        return self.teacher_states, self.layer_states, self.prefix_states


@dataclass(frozen=True)
class Taught:
    """Windows as a training reads them, with whoever knows the dense model's answers to them."""

    shelf: Shelf
    teacher: Teacher | None


@dataclass(frozen=True)
class Preparation:
    """Makes ready what a training reads.

    Attributes:
        student, layers: what is trained, and which of its layers.
        teacher_dir: the dense model; None without one.
        watched: the teacher's layer that is looked at; None for none.
        four_bit: whether the teacher is quantised.
        compute: of this process, with the batch size of frozen layers.
        ranks: the processes; the first one makes files, the others wait for it.
        beside: where files lie that are not kept.
    """

    student: Student
    layers: Sequence[int]
    teacher_dir: str | Path | None
    watched: int | None
    four_bit: bool
    compute: Compute
    ranks: Ranks
    beside: Unfinished

    def read(self, data: TrainingData, held_out: TrainingData | None, passes: float) -> list[Taught]:
        """The training windows and, if there are any, the held-out ones.

        What the layers below the first adapted one come to is kept, if not by a file that is given, then beside the
        adapter wherever windows come again: in a second pass.

        Args:
            data, held_out: what is given.
            passes: how often each window is trained on.

        Raises:
            DataError: stored states are of other windows or weights.
            PipelineError: there is no room for what must be kept.
        """
        first = min(self.layers)
        given = data.prefix_states or (held_out.prefix_states if held_out else None)
        keeps = bool(prefix_sources(self.student, first)) and (given is not None or passes > 1)
        shelves = [self._shelf(data, PREFIX if keeps else None)]
        teachers = [self._teacher(data)]
        if held_out:
            shelves.append(self._shelf(held_out, HELD_OUT_PREFIX if keeps else None))
            teachers.append(self._held_out_teacher(held_out, teachers[0]))
        return [Taught(_answered(shelf, each), each) for shelf, each in zip(shelves, teachers, strict=True)]

    def _shelf(self, data: TrainingData, kept: str | None) -> Shelf:
        shelf, first = Shelf(data.windows, self.compute.device), min(self.layers)
        if kept is None:
            return shelf
        compute = self.compute

        def opened(path: str | Path) -> ActivationReader:
            return open_prefix(path, self.student, first, data.windows, compute.dtype, compute.device)

        if data.prefix_states:
            return replace(shelf, entering=opened(data.prefix_states))
        path = self.beside.file(kept)
        make = partial(prefix_states, self.student, first, data.windows, path, compute=compute)
        return replace(shelf, entering=self._kept(path, opened, make))

    def _teacher(self, data: TrainingData) -> Teacher | None:
        if self.teacher_dir is None:
            return None
        files = TeacherFiles(self.teacher_dir, data.teacher_states, data.layer_states)
        return Teacher(files, data.windows, self.compute.dtype, self.compute.device, self.watched, self.four_bit)

    def _held_out_teacher(self, held_out: TrainingData, teacher: Teacher | None) -> Teacher | None:
        """The teacher of the held-out windows: the one in memory, if there is one; else its states, made if need be."""
        if teacher is None or self.teacher_dir is None or teacher.states is None:
            return teacher
        dense, windows, compute = self.teacher_dir, held_out.windows, self.compute

        def opened(path: str | Path) -> Teacher:
            return Teacher(TeacherFiles(dense, path), windows, compute.dtype, compute.device)

        if held_out.teacher_states:
            return opened(held_out.teacher_states)
        path = self.beside.file(HELD_OUT_TEACHER)
        return self._kept(path, opened, partial(teacher_states, dense, windows, path, compute=compute))

    def _kept(self, path: Path, opened: Callable[[Path], Opened], make: Callable[[], None]) -> Opened:
        """A file beside the adapter, opened; the first process makes it, unless a killed run has made this very one."""
        if self.ranks.first:
            try:
                opened(path)
            except PipelineError:  # it is not there, or is of another training
                path.unlink(missing_ok=True)
                make()
        self.ranks.wait()
        return opened(path)


def _answered(shelf: Shelf, teacher: Teacher | None) -> Shelf:
    return shelf if teacher is None else replace(shelf, taught=teacher.states, taught_layer=teacher.layer_states)


def predictions(windows: Windows) -> torch.Tensor:
    """How many tokens of each window are scored, int64, shape (windows,)."""
    if windows.scored is None:
        return torch.full((len(windows),), windows.seqlen - 1)
    return windows.scored[:, 1:].sum(1)
