"""LoRA adapters trained so that a model with fewer layers, or with restored ones, answers like the dense model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.pruning_identity import read_identity
from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.curve import (
    COLUMNS,
    HELD_OUT_COLUMNS,
    Logger,
    Table,
    check_loggers,
    open_loggers,
)
from mistral_prune_lora.distillation.held_out import HeldOut, check_disjoint
from mistral_prune_lora.distillation.loop import Loop, Outcome, Watch
from mistral_prune_lora.distillation.prepare import Preparation, TrainingData, predictions
from mistral_prune_lora.distillation.ranks import Ranks, local_device, started
from mistral_prune_lora.distillation.schedule import FROZEN_BATCH, passes_over
from mistral_prune_lora.distillation.settings import Running, TrainingSettings
from mistral_prune_lora.distillation.start import StartAdapter
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher_record import weight_digests
from mistral_prune_lora.distillation.unfinished import CURVE, HELD_OUT, Unfinished
from mistral_prune_lora.distillation.written import RECORD, write_adapter
from mistral_prune_lora.errors import AdapterError, DataError, LayoutError, PipelineError
from mistral_prune_lora.models.four_bits import check_four_bits
from mistral_prune_lora.provenance import PACKAGE, versions
from mistral_prune_lora.storage.dtypes import torch_name
from mistral_prune_lora.storage.outputs import Output, claim
from mistral_prune_lora.storage.space import reserved_space
from mistral_prune_lora.storage.transaction import atomic_directory
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.record import config_sha256
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows

_SMALL_FILES = 4 << 20  # room for configuration, card and curve beside the weights


@dataclass(frozen=True)
class TrainingJob:
    """One adapter to train.

    Attributes:
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
        start_dir: a LoRA adapter of the same part to start from, which the result holds too; None starts from nothing.
    """

    part: str
    student: Student
    teacher_dir: str | Path | None
    data: TrainingData
    output_dir: Path
    settings: TrainingSettings
    compute: Compute
    held_out: TrainingData | None = None
    running: Running = field(default_factory=Running)
    start_dir: str | Path | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that get an adapter."""
        settings = self.settings
        return self.student.adapted_layers(self.part, settings.adapt_layers, tuple(settings.stages))

    @cached_property
    def start(self) -> StartAdapter | None:
        """The adapter to start from; AdapterError if it is none that these settings can go on from."""
        if self.start_dir is None:
            return None
        if len(self.layers_by_part()) > 1:
            told = "parts that are trained together start from nothing"
            raise AdapterError(told, where=self.start_dir, mend="leave the adapter to start from out")
        return StartAdapter.open(self.start_dir, self.student, self.layers, self.settings.lora)

    def check(self) -> None:
        """Raise what speaks against it, from headers alone: before states are made for it.

        Raises:
            PipelineError: there is no teacher, and the loss asks for one; states and a teacher that contradict each
                other; a logger's package is not installed.
            LayoutError, CheckpointError, AdapterError, DataError: as for `train_adapter`.
        """
        loss, watched = self.settings.loss, self.settings.loss.hidden
        if self.teacher_dir is None and (loss.kd_alpha or watched):
            raise PipelineError(
                "there is no teacher to learn from", where="kd_alpha", mend="name the dense model, or set it to 0"
            )
        if self.settings.teacher_4bit:
            check_four_bits(self.compute.device)
            if self.data.teacher_states:
                raise PipelineError(
                    "stored states are those of the teacher as it is, not of a quantised one",
                    where="teacher_4bit",
                    mend="leave one of them out",
                )
        check_loggers(self.running.loggers)
        self.student.check_modules(self.layers, self.settings.lora)
        if empty := [part for part, layers in self.layers_by_part().items() if not layers]:
            raise LayoutError(
                f"names no layer of {' and '.join(empty)}, which {self.part} trains too",
                where="adapt_layers",
                mend="name layers of each part, or leave it out",
            )
        _ = self.start
        self._check_stages()
        layers, active = self.layers, {source.index for source in self.student.sources()}
        if watched and (watched.student_layer not in active or watched.student_layer < min(layers)):
            raise LayoutError(
                f"layer {watched.student_layer} is none that the student runs at or behind layer {min(layers)}",
                where="hidden.student_layer",
                mend="name an active layer at or above the first adapted one",
            )
        for windows in (each.windows for each in (self.data, self.held_out) if each):
            empty = (predictions(windows) == 0).nonzero().flatten().tolist()
            if empty:
                raise DataError(
                    f"nothing is scored in window {empty[0]}", where=windows.identity.source, mend="leave it out"
                )
        if self.held_out:
            check_disjoint(self.data.windows, self.held_out.windows)

    def _check_stages(self) -> None:
        """Raise a PipelineError for several stages where one is all that can be trained."""
        if not self.settings.stages:
            return
        faults = {
            f"{self.part}'s adapter is trained at one stage": self.part != "A",
            "a hidden state is watched at one stage": self.settings.loss.hidden is not None,
            "prefix states are of one stage": any(data.prefix_states for data in (self.data, self.held_out) if data),
        }
        for told, wrong in faults.items():
            if wrong:
                raise PipelineError(f"{told}, and several are named", where="stages", mend="leave one of the two out")

    def record(self, ranks: Ranks) -> dict:
        """Everything that the adapter's bytes depend on, but for what only moves roundings."""
        folders = (self.student.model_dir, *self.student.bundles)
        return {
            "part": self.part,
            "layers": list(self.layers),
            "student": [weight_digests(folder) for folder in folders],
            "teacher": weight_digests(self.teacher_dir) if self.teacher_dir else None,
            "configs": [config_sha256(open_checkpoint(each)) for each in (folders[0], self.teacher_dir) if each],
            "windows": _identity(self.data.windows),
            "held_out": _identity(self.held_out.windows) if self.held_out else None,
            "settings": asdict(self.settings),
            "dtype": torch_name(self.compute.dtype),
            "processes": ranks.world,
            "versions": versions(PACKAGE, "torch", "transformers", "peft"),
            **({"start": self.start.record} if self.start else {}),
        }

    def train(self, ranks: Ranks, beside: Unfinished, fresh: Path | None, doubts: list[str] | None = None) -> None:
        """Train to the end; the first process writes the result into a fresh directory."""
        device, layers, settings = local_device(self.compute.device), self.layers, self.settings
        compute = replace(self.compute, device=device, batch_size=FROZEN_BATCH)
        hidden = settings.loss.hidden
        watched = hidden.teacher_layer if hidden else None
        four_bit = settings.teacher_4bit
        prepare = Preparation(self.student, layers, self.teacher_dir, watched, four_bit, compute, ranks, beside)
        # What is below the first adapted layer is another thing at every stage.
        passes = 1 if settings.stages else passes_over(len(self.data.windows), settings.optimiser, ranks.world)
        training, *others = prepare.read(self.data, self.held_out, passes)
        whole = training.shelf.entering is None
        adapted = AdaptedStudent(self.student, layers, settings, compute, with_prefix=whole, start=self.start)
        held_out = HeldOut(others[0].shelf, others[0].teacher, ranks) if others else None
        if held_out and others[0].teacher:
            others[0].teacher.same_head(adapted.head)
        state = beside.load(quiet=not ranks.first)
        ranks.wait()  # nobody writes there before everybody has read
        rows = state.tensors if state else {}
        room = reserved_space(fresh, _adapter_bytes(adapted.model), where=self.output_dir) if fresh else nullcontext()
        with room, self._loggers(fresh is not None) as loggers:
            curve = Table(beside.file(CURVE) if fresh else None, COLUMNS, rows.get("curve"))
            looks = Table(beside.file(HELD_OUT) if fresh else None, HELD_OUT_COLUMNS, rows.get("held_out"))
            watch = Watch(curve, looks, loggers, beside.save if fresh else None, self.running.save_steps)
            loop = Loop(adapted, training.teacher, training.shelf, held_out, settings, watch, ranks)
            if state:
                loop.restore(state)
                if fresh:
                    print(f"goes on after step {loop.step} of {settings.optimiser.steps} ({beside.path})", flush=True)
            outcome = loop.run()
        if fresh:
            by_part, about = self.layers_by_part(), self._about(outcome, doubts or [], ranks)
            write_adapter(fresh, adapted.model, by_part, about, curve, looks, self.start)

    def layers_by_part(self) -> dict[str, list[int]]:
        """The adapted layers of each part that is trained."""
        adapted, parts = set(self.layers), self.student.layers_by_part(self.part, tuple(self.settings.stages))
        return {part: [layer for layer in layers if layer in adapted] for part, layers in parts.items()}

    def _about(self, outcome: Outcome, doubts: list[str], ranks: Ranks) -> dict:
        """The record of the training, but for its files."""
        student, record = self.student, self.record(ranks)
        folders = [os.fspath(folder) for folder in (student.model_dir, *student.bundles)]
        settings = dict(record["settings"])
        held_out = None if self.held_out is None else self.held_out.windows.identity.content()
        teacher = None if self.teacher_dir is None else os.fspath(self.teacher_dir)
        return {
            "command": "train",
            "stage": self.part,
            "layers": record["layers"],
            "student": {"dir": folders[0], "weights": record["student"][0]},
            "bundles": dict(zip(folders[1:], record["student"][1:], strict=True)),
            "pruning_identities": {folder: read_identity(folder) for folder in folders},
            "teacher": {"dir": teacher, "weights": record["teacher"]} if teacher else None,
            "start": {"dir": os.fspath(self.start_dir), **record["start"]} if self.start_dir else None,
            "windows": self.data.windows.identity.content(),
            "scored_tokens": self.data.windows.predicted_tokens,
            "held_out": held_out,
            "settings": settings,
            "dtype": record["dtype"],
            "seed": settings.pop("seed"),
            "processes": ranks.world,
            "machine": _machine(self.compute),
            "updates": outcome.updates,
            "kept_step": outcome.kept_step,
            "skipped": outcome.skipped,
            "ended_early": outcome.ended_early,
            "warnings": doubts,
            "versions": record["versions"],
        }

    @contextmanager
    def _loggers(self, first: bool) -> Iterator[list[Logger]]:
        about = {"part": self.part, "student": os.fspath(self.student.model_dir)}
        opened = open_loggers(self.running.loggers, self.output_dir, about) if first else []
        try:
            yield opened
        finally:
            for logger in opened:
                logger.close()


def train_adapter(job: TrainingJob, *, overwrite: bool = False) -> None:
    """Train the adapter of one part and write it as a stock PEFT directory with its curve, record and model card.

    Frozen weights are in the compute dtype, LoRA weights and the loss in float32. Backpropagation ends at the lowest
    adapted layer. On the CPU the same settings give the same bytes for the same number of threads, whether a run was
    killed in between or not; on a GPU, kernels that sum in varying order do not promise that. Under `torchrun` all
    processes train one adapter, each with its share of every update.

    Args:
        job: what is trained, on what, how, and where to.
        overwrite: replace what is no adapter that was trained here, too; never an input.

    Raises:
        PipelineError: the output may not or cannot be written, see `outputs.claim` and `transaction.atomic_directory`;
            another process trains this adapter; as for `TrainingJob.check`.
        LayoutError, CheckpointError: the student or a bundle is not what the part needs, or of another pruning.
        DataError: stored states belong to other windows, weights or another teacher; windows that nothing is scored in,
            or that are held out and trained on.
        NumberError: a loss, a gradient or a weight becomes NaN or infinity; nothing is written then.
        SystemExit: the process was asked to end; the same call goes on from the state that was saved.
    """
    job.check()
    student, data, held_out, output_dir = job.student, job.data, job.held_out, job.output_dir
    read = [student.model_dir, *student.bundles, job.teacher_dir, job.start_dir, *data.files]
    read += held_out.files if held_out else ()
    check = claim([Output.directory(output_dir, "--output_dir", RECORD)], read, overwrite=overwrite)
    with started(job.compute.device) as ranks:
        beside = Unfinished(output_dir, job.record(ranks))
        if not ranks.first:
            ranks.wait()
            job.train(ranks, beside, None)
            return
        doubts = warn_of(student.checkpoint(), data.windows)
        # Entered before the training, which would be lost if its result could not be written.
        with beside.held():
            with atomic_directory(output_dir, check=check) as fresh:
                ranks.wait()
                job.train(ranks, beside, fresh, doubts)
            beside.remove()


def _identity(windows: Windows) -> dict:
    told = {"ids_sha256": windows.identity.ids_sha256, "scored_sha256": windows.scored_sha256}
    return told | {"shape": list(windows.ids.shape)}


def _machine(compute: Compute) -> dict:
    """What moves roundings."""
    return {
        "device": compute.device.type,
        "threads": torch.get_num_threads() if compute.device.type == "cpu" else None,
    }


def _adapter_bytes(model: PeftModel) -> int:
    """The size of an adapter's directory, at most."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + _SMALL_FILES
