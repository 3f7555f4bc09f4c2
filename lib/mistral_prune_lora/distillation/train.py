"""LoRA adapters trained so that a model with fewer layers, or with restored ones, answers like the dense model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from mistral_prune_lora.checkpoints.pruning_identity import read_identity
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Shelf
from mistral_prune_lora.distillation.card import model_card
from mistral_prune_lora.distillation.curve import COLUMNS, HELD_OUT_COLUMNS, Table, open_loggers
from mistral_prune_lora.distillation.held_out import HeldOut, check_disjoint
from mistral_prune_lora.distillation.loop import Loop, Outcome, Watch
from mistral_prune_lora.distillation.prefix import open_prefix, prefix_sources, prefix_states
from mistral_prune_lora.distillation.ranks import Ranks, local_device, started
from mistral_prune_lora.distillation.schedule import passes_over
from mistral_prune_lora.distillation.settings import Running, TrainingSettings
from mistral_prune_lora.distillation.student import Student, parts_of
from mistral_prune_lora.distillation.teacher import Teacher, TeacherFiles
from mistral_prune_lora.distillation.teacher_record import weight_digests
from mistral_prune_lora.distillation.unfinished import (
    CURVE,
    HELD_OUT,
    HELD_OUT_PREFIX,
    PREFIX,
    Unfinished,
    unfinished,
)
from mistral_prune_lora.errors import DataError, LayoutError, PipelineError
from mistral_prune_lora.provenance import PACKAGE, other_files_sha256, versions
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.dtypes import torch_name
from mistral_prune_lora.storage.json_file import read_json, write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim, listed_files
from mistral_prune_lora.storage.space import reserved_space
from mistral_prune_lora.storage.transaction import atomic_directory
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "training.csv", "training.json")
_SMALL_FILES = 4 << 20  # room for configuration, card and curve beside the weights
_PREFIX_BATCH = 4  # windows that go through a frozen layer together


@dataclass(frozen=True)
class TrainingData:
    """Windows, and what is stored of them.

    Attributes:
        windows: the token ids.
        teacher_states, layer_states: the teacher's final hidden states, and those of the watched layer, in files; None
            runs the teacher along.
        prefix_states: what enters the first adapted layer, in a file. None computes it where it is needed: kept beside
            the adapter where windows come again, else as part of each step.
    """

    windows: Windows
    teacher_states: str | Path | None = None
    layer_states: str | Path | None = None
    prefix_states: str | Path | None = None

    @property
    def files(self) -> tuple[str | Path | None, ...]:
        """All of them."""
        return self.teacher_states, self.layer_states, self.prefix_states


def _recorded(content: dict) -> set[str] | None:
    """The files of an adapter that was trained here by its record; None if it is no such record."""
    # A record that was written before records named their command is told by all that it holds.
    shape = {"stage", "layers", "student", "teacher", "windows", "settings", "versions"}
    if "command" not in content:
        return set(_ADAPTER_FILES) if shape <= content.keys() else None
    ours = content["command"] == "train" and isinstance(content.get("files"), list)
    return {str(name) for name in content["files"]} if ours else None


RECORD = Record("training.json", "training", _recorded)


def train_adapter(
    part: str,
    student: Student,
    teacher_dir: str | Path | None,
    data: TrainingData,
    output_dir: str | Path,
    *,
    settings: TrainingSettings,
    compute: Compute,
    held_out: TrainingData | None = None,
    running: Running | None = None,
    overwrite: bool = False,
) -> None:
    """Train the adapter of one part and write it as a stock PEFT directory with its curve, record and model card.

    Frozen weights are in the compute dtype, LoRA weights and the loss in float32. Backpropagation ends at the lowest
    adapted layer. On the CPU the same settings give the same bytes for the same number of threads, whether a run was
    killed in between or not; on a GPU, kernels that sum in varying order do not promise that. Under `torchrun` all
    processes train one adapter, each with its share of every update.

    Args:
        part: "A" (adapts kept layers), "B" or "C" (adapts that bundle's layers); "AB" or "FULL" trains the parts of
            that stage together, and the output holds a directory `A_lora`, `B_lora`, `C_lora` for each.
        student: what is trained.
        teacher_dir: the dense model; None trains on cross-entropy alone (kd_alpha 0), and no KL is measured.
        data: training windows; their order is drawn anew for every pass over them.
        output_dir: the adapter's directory, written whole or not at all; that it can be is known before training. While
            it is trained, `NAME.unfinished` lies beside it.
        settings: the adapter's shape, the loss, the optimiser.
        compute: device and dtype.
        held_out: windows to look at meanwhile; None looks at none.
        running: how often the state is saved, loggers.
        overwrite: replace what is no adapter that was trained here, too; never an input.

    Raises:
        PipelineError: the output may not or cannot be written, see `outputs.claim` and `transaction.atomic_directory`;
            there is no teacher, and kd_alpha asks for one; another process trains this adapter.
        LayoutError, CheckpointError: the student or a bundle is not what the part needs, or of another pruning.
        DataError: stored states belong to other windows, weights or another teacher; windows that nothing is scored in,
            or that are held out and trained on.
        NumberError: a loss, a gradient or a weight becomes NaN or infinity; nothing is written then.
        SystemExit: the process was asked to end; the same call goes on from the state that was saved.
    """
    job = _Job(part, student, teacher_dir, data, held_out, settings, compute, running or Running(), Path(output_dir))
    job.check()
    read = [student.model_dir, *student.bundles, teacher_dir, *data.files, *(held_out.files if held_out else ())]
    check = claim([Output.directory(output_dir, "--output_dir", RECORD)], read, overwrite=overwrite)
    with started(compute.device) as ranks:
        if not ranks.first:
            job.train(ranks, None)
            return
        doubts = warn_of(student.checkpoint(), data.windows)
        # Entered before the training, which would be lost if its result could not be written.
        with atomic_directory(output_dir, check=check) as fresh, unfinished(output_dir, job.record(ranks)) as beside:
            adapted, outcome, tables = job.train(ranks, beside, fresh)
            job.write(fresh, adapted, outcome, tables, doubts, ranks)
        beside.remove()


@dataclass(frozen=True)
class _Job:
    """What one call of `train_adapter` was given."""

    part: str
    student: Student
    teacher_dir: str | Path | None
    data: TrainingData
    held_out: TrainingData | None
    settings: TrainingSettings
    compute: Compute
    running: Running
    output_dir: Path

    def check(self) -> None:
        """Raise what `train_adapter` raises for inputs that contradict each other."""
        loss, watched = self.settings.loss, self.settings.loss.hidden
        if self.teacher_dir is None and (loss.kd_alpha or watched):
            raise PipelineError(
                "there is no teacher to learn from", where="kd_alpha", mend="name the dense model, or set it to 0"
            )
        layers, active = self.layers, {source.index for source in self.student.sources()}
        if watched and (watched.student_layer not in active or watched.student_layer < min(layers)):
            raise LayoutError(
                f"layer {watched.student_layer} is none that the student trains or runs behind layer {min(layers)}",
                where="hidden.student_layer",
                mend="name an active layer at or above the first adapted one",
            )
        for data in filter(None, (self.data, self.held_out)):
            windows = data.windows
            empty = [] if windows.scored is None else (~windows.scored[:, 1:].any(1)).nonzero().flatten().tolist()
            if empty:
                raise DataError(
                    f"nothing is scored in window {empty[0]}", where=windows.identity.source, mend="leave it out"
                )
        if self.held_out:
            check_disjoint(self.data.windows, self.held_out.windows)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that get an adapter."""
        return self.student.adapted_layers(self.part, self.settings.adapt_layers)

    def record(self, ranks: Ranks) -> dict:
        """Everything that the adapter's bytes depend on, but for what only moves roundings."""
        folders = (self.student.model_dir, *self.student.bundles)
        return {
            "part": self.part,
            "layers": list(self.layers),
            "student": [weight_digests(folder) for folder in folders],
            "teacher": weight_digests(self.teacher_dir) if self.teacher_dir else None,
            "windows": _identity(self.data.windows),
            "held_out": _identity(self.held_out.windows) if self.held_out else None,
            "settings": asdict(self.settings),
            "dtype": torch_name(self.compute.dtype),
            "processes": ranks.world,
            "versions": versions(PACKAGE, "torch", "transformers", "peft"),
        }

    def train(
        self, ranks: Ranks, beside: Unfinished | None, fresh: Path | None = None
    ) -> tuple[AdaptedStudent, Outcome, list[Table]]:
        """Train to the end; only the first process is given a place to write."""
        device = local_device(self.compute.device)
        compute = Compute(device, self.compute.dtype, _PREFIX_BATCH, self.compute.max_memory)
        shelves = [self._shelf(self.data, PREFIX, compute, ranks)]
        if self.held_out:
            shelves.append(self._shelf(self.held_out, HELD_OUT_PREFIX, compute, ranks))
        stored = all(shelf.entering for shelf in shelves)
        adapted = AdaptedStudent(self.student, self.layers, self.settings, compute, with_prefix=not stored)
        teachers = [self._teacher(data, device) for data in filter(None, (self.data, self.held_out))]
        shelves = [_with_answers(shelf, each) for shelf, each in zip(shelves, teachers, strict=True)]
        held_out = HeldOut(shelves[1], teachers[1], ranks) if self.held_out else None
        state = beside.load() if beside else None
        folder = beside.path if beside else None
        with _tables(folder, state) as tables, self._loggers(beside) as loggers:
            save = beside.save if beside else None
            watch = Watch(*tables, loggers=loggers, save=save, save_steps=self.running.save_steps)
            loop = Loop(adapted, teachers[0], shelves[0], held_out, self.settings, watch, ranks)
            _go_on(loop, state, ranks)
            with reserved_space(fresh, _adapter_bytes(adapted.model), where=self.output_dir) if fresh else _nothing():
                return adapted, loop.run(), tables
