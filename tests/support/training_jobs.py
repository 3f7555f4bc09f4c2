"""Training with everything by one name each, as a command line or a configuration names it."""

from __future__ import annotations

import torch

from mistral_prune_lora.distillation.settings import TrainingSettings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher import TeacherFiles
from mistral_prune_lora.distillation.train import train_adapter
from mistral_prune_lora.streaming.compute import Compute


def train_job(
    part, *, student_dir, teacher_dir, windows, output_dir, bundles=(), states=None, dtype=torch.bfloat16,
    overwrite=False, **settings,
) -> None:  # fmt: skip
    """Train an adapter on the CPU; the rest by the names of TrainingSettings' fields."""
    train_adapter(
        part,
        Student(student_dir, tuple(bundles)),
        TeacherFiles(teacher_dir, states) if teacher_dir else None,
        windows,
        output_dir,
        settings=TrainingSettings(**settings),
        compute=Compute(torch.device("cpu"), dtype),
        overwrite=overwrite,
    )
