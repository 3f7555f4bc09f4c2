"""LoRA adapters trained so that a model with fewer layers, or with restored ones, answers like the dense model."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel

from mistral_prune_lora.checkpoints.pruning_identity import read_identity
from mistral_prune_lora.console import progress
from mistral_prune_lora.distillation.loss import backward
from mistral_prune_lora.distillation.settings import OptimiserSettings, TrainingSettings
from mistral_prune_lora.distillation.student import Student, with_adapter
from mistral_prune_lora.distillation.teacher import Teacher, TeacherFiles
from mistral_prune_lora.distillation.teacher_record import weight_digests
from mistral_prune_lora.errors import NumberError, PipelineError
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.provenance import PACKAGE, other_files_sha256, versions
from mistral_prune_lora.storage.dtypes import torch_name
from mistral_prune_lora.storage.finite import all_finite
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim, listed_files
from mistral_prune_lora.storage.space import reserved_space
from mistral_prune_lora.storage.transaction import atomic_directory
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows

_CALMER = "Use a smaller learning rate, or bf16 or fp32 instead of fp16; nothing was written"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "training.csv", "training.json")
_SMALL_FILES = 4 << 20  # room for configuration, card and curve beside the weights


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
    teacher: TeacherFiles | None,
    windows: Windows,
    output_dir: str | Path,
    *,
    settings: TrainingSettings,
    compute: Compute,
    overwrite: bool = False,
) -> None:
    """Train the adapter of one part and write it as a stock PEFT directory with training.csv and training.json.

    Frozen weights are in the compute dtype, LoRA weights and the loss in float32. Backpropagation ends at the lowest
    adapted layer. On the CPU the same settings give the same bytes for the same number of threads; on a GPU, kernels
    that sum in varying order do not promise that.

    Args:
        part: "A" (adapts kept layers), "B" or "C" (adapts that bundle's layers).
        student: what is trained.
        teacher: the dense model; None trains on cross-entropy alone (kd_alpha 0), and no KL is measured.
        windows: training windows; their order is drawn anew for every pass over them.
        output_dir: the adapter's directory, written whole or not at all; that it can be is known before training.
        settings: the adapter's shape, the loss, the optimiser.
        compute: device and dtype.
        overwrite: replace what is no adapter that was trained here, too; never an input.

    Raises:
        PipelineError: the output may not or cannot be written, see `outputs.claim` and `transaction.atomic_directory`.
        LayoutError, CheckpointError: the student or a bundle is not what the part needs, or of another pruning.
        DataError: the teacher's states belong to other windows or another teacher.
        PipelineError: there is no teacher, and kd_alpha asks for one.
        NumberError: a loss, a gradient or a weight becomes NaN or infinity; nothing is written then.
    """
    if teacher is None and settings.loss.kd_alpha:
        raise PipelineError(
            "there is no teacher to learn from", where="kd_alpha", mend="name the dense model, or set it to 0"
        )
    read = [student.model_dir, *student.bundles, *((teacher.model_dir, teacher.states) if teacher else ())]
    check = claim([Output.directory(output_dir, "--output_dir", RECORD)], read, overwrite=overwrite)
    torch.manual_seed(settings.seed)
    layers, doubts = student.layers(part), warn_of(student.checkpoint(), windows)
    # Entered before the training, which would be lost if its result could not be written.
    with atomic_directory(output_dir, check=check) as fresh:
        model = _adapted(student, layers, settings, compute)
        dense = None if teacher is None else Teacher(teacher, windows, compute.dtype, compute.device)
        with reserved_space(fresh, _adapter_bytes(model), where=output_dir):
            curve = _fit(model.train(), dense, windows, settings, compute.device)
        model.save_pretrained(os.fspath(fresh))
        curve.to_csv(fresh / "training.csv", index=False)
        about = {
            "command": "train",
            "stage": part,
            "layers": list(layers),
            "student": {"dir": os.fspath(student.model_dir), "weights": weight_digests(student.model_dir)},
            "bundles": {os.fspath(b): weight_digests(b) for b in student.bundles},
            "pruning_identities": {os.fspath(d): read_identity(d) for d in (student.model_dir, *student.bundles)},
            "teacher": {"dir": os.fspath(teacher.model_dir), "weights": dense.digests} if teacher and dense else None,
            "windows": asdict(windows.identity),
            "settings": {name: asdict(getattr(settings, name)) for name in ("lora", "loss", "optimiser")},
            "dtype": torch_name(compute.dtype),
            "seed": settings.seed,
            "warnings": doubts,
            "files": [*listed_files(fresh), RECORD.name],
            "outputs": other_files_sha256(fresh, ()),
            "versions": versions(PACKAGE, "torch", "transformers", "peft"),
        }
        write_json(fresh / RECORD.name, about)


def _adapted(student: Student, layers: Sequence[int], settings: TrainingSettings, compute: Compute) -> PeftModel:
    """The student with a fresh adapter, on the device."""
    model = load_model(student.model_dir, dtype=compute.dtype, device=compute.device, bundles=student.bundles)
    adapted = with_adapter(model, layers, settings.lora)
    if settings.gradient_checkpointing:
        # Reentrant checkpointing would need inputs that require gradients, and so a backward pass below the adapter.
        model.activation_checkpointing_enable({"use_reentrant": False})
    return adapted


def _adapter_bytes(model: PeftModel) -> int:
    """The size of an adapter's directory, at most."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + _SMALL_FILES


def _fit(
    model: PeftModel, teacher: Teacher | None, windows: Windows, settings: TrainingSettings, device: torch.device
) -> pd.DataFrame:
    """The training loop; one row a step: step, loss, kl, ce (means over tokens), learning_rate, grad_norm, tokens.

    Raises:
        NumberError: a loss or the gradient's norm is NaN or infinity, at once; or a weight is, at the end.
    """
    optimiser, order = settings.optimiser, random.Random(settings.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    updater = torch.optim.AdamW(trained, lr=optimiser.learning_rate, weight_decay=optimiser.weight_decay)
    batches = _endless_batches(len(windows.ids), optimiser.batch_size, order)
    rows = []
    with progress(total=optimiser.steps, description="train", unit="step") as bar:
        for step in range(optimiser.steps):
            rate = optimiser.learning_rate * _schedule(step, optimiser)
            for group in updater.param_groups:
                group["lr"] = rate
            sums, tokens = torch.zeros(3, dtype=torch.float64), 0
            chosen = [next(batches) for _ in range(optimiser.gradient_accumulation)]
            total = sum(len(batch) for batch in chosen) * (windows.seqlen - 1)
            for batch in chosen:
                ids = windows.ids[batch].long().to(device)
                taught, head = (teacher.hidden(batch), teacher.head) if teacher else (None, None)
                sums += backward(model, ids, taught, head, settings.loss, total)
                tokens += ids.numel()
            norm = torch.nn.utils.clip_grad_norm_(trained, optimiser.max_grad_norm)
            updater.step()
            updater.zero_grad(set_to_none=True)
            mean, length = (sums / total).tolist(), float(norm)
            told = dict(zip(("loss", "KL", "cross-entropy"), mean, strict=True), gradient=length)
            _check_step(step + 1, told if teacher else {name: v for name, v in told.items() if name != "KL"})
            rows.append((step + 1, *mean, rate, length, tokens))
            bar.set_postfix_str(f"loss {mean[0]:.4f}", refresh=False)
            bar.update()
    if not all(all_finite(weight) for weight in trained):
        raise NumberError(f"after {optimiser.steps} steps weights are NaN or infinity", mend=_CALMER)
    return pd.DataFrame(rows, columns=["step", "loss", "kl", "ce", "learning_rate", "grad_norm", "tokens"])


def _check_step(step: int, values: Mapping[str, float]) -> None:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise NumberError(f"the {wrong[0]} of step {step} is {values[wrong[0]]}, so training ends here", mend=_CALMER)


def _endless_batches(count: int, batch_size: int, order: random.Random) -> Iterator[list[int]]:
    """Window numbers in batches, every window once before any comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            fresh = list(range(count))
            order.shuffle(fresh)
            waiting += fresh
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _schedule(step: int, settings: OptimiserSettings) -> float:
    """The share of the peak learning rate: linear warm-up, then a cosine that would reach zero after the last step."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
