"""Training with everything by one name each, as a command line or a configuration names it."""

from __future__ import annotations

from pathlib import Path

import torch

from mistral_prune_lora.distillation.prepare import TrainingData
from mistral_prune_lora.distillation.settings import Running, TrainingSettings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.train import TrainingJob, train_adapter
from mistral_prune_lora.streaming.compute import Compute


def train_job(
    part, *, student_dir, teacher_dir, windows, output_dir, bundles=(), states=None, prefix=None, held_out_windows=None,
    save_steps=50, loggers=(), dtype=torch.bfloat16, overwrite=False, start=None, **settings,
) -> None:  # fmt: skip
    """Train an adapter on the CPU; the rest by the names of TrainingSettings' fields."""
    job = TrainingJob(
        part,
        Student(student_dir, tuple(bundles)),
        teacher_dir,
        TrainingData(windows, states, prefix_states=prefix),
        Path(output_dir),
        TrainingSettings(**settings),
        Compute(torch.device("cpu"), dtype),
        None if held_out_windows is None else TrainingData(held_out_windows),
        Running(save_steps, tuple(loggers)),
        start,
    )
    train_adapter(job, overwrite=overwrite)
