"""A training step: loss and gradients beside a plain step of transformers and PEFT, in float32 and in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from gpu_checks import plain
from gpu_checks.finding import Finding, largest, within
from gpu_checks.plain import Step
from gpu_checks.setting import Setting, exact_float32
from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Shelf
from mistral_prune_lora.distillation.curve import COLUMNS, HELD_OUT_COLUMNS, Table
from mistral_prune_lora.distillation.loop import Loop, Watch
from mistral_prune_lora.distillation.ranks import Ranks
from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings, OptimiserSettings, TrainingSettings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher import Teacher, TeacherFiles
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES
from mistral_prune_lora.streaming.compute import Compute

BATCH = 2  # windows in the step
LOSS = LossSettings()
# Relative, of sums over all tokens; and the length of what gradients are away by, of their own length. In float32 each
# parameter's gradient is looked at, in bf16 all of them as one: what is nearly zero is mostly rounding there.
LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-2}
GRADIENT_BOUND = {"fp32": 1e-3, "bf16": 0.15}


def check_training(setting: Setting) -> Iterator[Finding]:
    """A step of part A from the teacher's stored states, in float32 and bf16, beside a plain one in float32."""
    with exact_float32():
        plainly = plain_step(setting)
        for name in ("fp32", "bf16"):
            store_states(setting, name)
            yield from _beside(name, step(setting, name), plainly)


def step(setting: Setting, dtype: str) -> Step:
    """Ours, of part A; the teacher's states must be there."""
    compute, windows = Compute(setting.device, COMPUTE_DTYPES[dtype], BATCH), setting.trained
    student, settings = Student(setting.parts["A"]), training_settings(setting, 1)
    teacher = Teacher(TeacherFiles(setting.dense, _states(setting, dtype)), windows, compute.dtype, compute.device)
    shelf = Shelf(windows, compute.device, taught=teacher.states)
    adapted = AdaptedStudent(student, student.layers("A"), settings, compute)
    parameters = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    plain.fill(parameters)
    watch = Watch(Table(None, COLUMNS), Table(None, HELD_OUT_COLUMNS))
    loop = Loop(adapted, teacher, shelf, None, settings, watch, Ranks())
    whole, divergence, entropy = loop._add_gradients(shelf.read(range(BATCH))).tolist()
    gradients = {name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None}
    return Step((whole, divergence, entropy), gradients)


def plain_step(setting: Setting) -> Step:
    """The same in transformers and PEFT, float32, dense model and student in memory."""
    lora, ids = training_settings(setting, 1).lora, setting.trained.ids[:BATCH]
    return plain.trained(setting.dense, setting.size.layout.kept, lora, LOSS, ids, setting.device)


def training_settings(setting: Setting, steps: int) -> TrainingSettings:
    """A training of so many updates."""
    lora = LoraSettings(setting.size.rank, 2 * setting.size.rank)
    return TrainingSettings(lora, LOSS, OptimiserSettings(steps, BATCH, 1, 1e-3, 1))


def store_states(setting: Setting, dtype: str) -> None:
    """Run the dense model over the training windows, unless that was done."""
    if not (path := _states(setting, dtype)).exists():
        compute = Compute(setting.device, COMPUTE_DTYPES[dtype], BATCH)
        teacher_states(setting.dense, setting.trained, path, compute=compute)


def _states(setting: Setting, dtype: str) -> Path:
    return setting.folder / f"teacher-{dtype}"


def _beside(name: str, ours: Step, theirs: Step) -> Iterator[Finding]:
    away = largest(abs(a - b) / abs(b) for a, b in zip(ours.loss, theirs.loss, strict=True))
    words = "loss, divergence, cross-entropy"
    yield within(f"{name}: {words} of a step beside PEFT's in float32", away, LOSS_BOUND[name])
    fault = _fault(ours, theirs)
    words = f"{name}: gradients of the adapter, float32 and finite"
    yield Finding(words, fault or f"{len(ours.gradients)} of them are", "all of PEFT's", fault is None)
    if fault is None:
        words = "each gradient" if name == "fp32" else "all gradients"
        away = _distance(ours.gradients, theirs.gradients, each=name == "fp32")
        yield within(f"{name}: {words} of a step beside PEFT's in float32", away, GRADIENT_BOUND[name])


def _distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, each: bool) -> float:
    """How far some finite tensors are from others, by length: the farthest of them, or all as one vector."""
    away = torch.stack([(found[name] - tensor).norm() for name, tensor in wanted.items()])
    lengths = torch.stack([tensor.norm() for tensor in wanted.values()])
    return float((away / lengths).max() if each else away.norm() / lengths.norm())


def _fault(ours: Step, theirs: Step) -> str | None:
    """What is wrong with the gradients, whatever their numbers; None if nothing is."""
    if ours.gradients.keys() != theirs.gradients.keys():
        return f"{len(ours.gradients.keys() ^ theirs.gradients.keys())} names differ"
    for name, gradient in ours.gradients.items():
        if gradient.dtype != torch.float32 or not bool(gradient.isfinite().all()):
            return f"not {name}"
    return None
