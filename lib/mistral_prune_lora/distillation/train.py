"""LoRA adapters trained so that a model with fewer layers, or with restored ones, answers like the dense model."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.directories import bundle_layers
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning, read_identity
from mistral_prune_lora.console import progress
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings, OptimiserSettings
from mistral_prune_lora.distillation.teacher_record import open_teacher_states, weight_digests
from mistral_prune_lora.errors import AdapterError, CheckpointError, LayoutError, NumberError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.provenance import PACKAGE, versions
from mistral_prune_lora.storage.dtypes import torch_name
from mistral_prune_lora.storage.finite import all_finite
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim, listed_files
from mistral_prune_lora.storage.space import reserved_space
from mistral_prune_lora.storage.transaction import atomic_directory
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows

_CALMER = "Use a smaller learning rate, or bf16 or fp32 instead of fp16; nothing was written"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "training.csv", "training.json")
_SMALL_FILES = 4 << 20  # room for configuration, card and curve beside the weights
_BLOCK_LOGITS = 1 << 25  # logits of one block of tokens: 128 MB of float32, once each for student and teacher


def _recorded(content: dict) -> set[str] | None:
    """The files of an adapter that was trained here by its record; None if it is no such record."""
    # A record that was written before records named their command is told by all that it holds.
    shape = {"stage", "layers", "student", "teacher", "windows", "settings", "versions"}
    if "command" not in content:
        return set(_ADAPTER_FILES) if shape <= content.keys() else None
    ours = content["command"] == "train" and isinstance(content.get("files"), list)
    return {str(name) for name in content["files"]} if ours else None


RECORD = Record("training.json", "training", _recorded)


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of Hinton et al. 2015 (https://arxiv.org/abs/1503.02531, section 2) summed over tokens, in float32.

    The factor temperature^2 keeps the gradient of the soft part as large as that of the hard part.

    Args:
        student, teacher: logits, shape (tokens, vocabulary). Without a teacher there is no KL (it is NaN), and the
            loss is the cross-entropy's part.
        targets: the true next tokens, int64, shape (tokens,).
        settings: weights of the two parts.

    Returns:
        Loss, KL(teacher || student) at the temperature, cross-entropy; each summed over tokens, scalar float32.
    """
    student, t = student.float(), settings.temperature
    ce = functional.cross_entropy(student, targets, reduction="sum")
    if teacher is None:
        return (1 - settings.kd_alpha) * ce, torch.full_like(ce, math.nan), ce
    kl = functional.kl_div(
        (student / t).log_softmax(-1), (teacher.float() / t).log_softmax(-1), log_target=True, reduction="sum"
    )
    return settings.kd_alpha * (t * t) * kl + (1 - settings.kd_alpha) * ce, kl, ce


def stage_layers(stage: str, layout: Layout) -> tuple[int, ...]:
    """The layers that the adapter of stage "A", "B" or "C" is trained on.

    Raises:
        LayoutError: the stage has no layers.
    """
    layers = layout.layers_of(stage)
    if not layers:
        raise LayoutError(f"{stage} holds no layers", where="manifest.json", mend="there is nothing to train for it")
    return layers


def train_adapter(
    stage: str,
    *,
    student_dir: str | Path,
    teacher_dir: str | Path | None,
    windows: Windows,
    output_dir: str | Path,
    bundles: Sequence[str | Path] = (),
    states: str | Path | None = None,
    lora: LoraSettings = LoraSettings(),
    loss: LossSettings = LossSettings(),
    optimiser: OptimiserSettings = OptimiserSettings(),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
    gradient_checkpointing: bool = False,
    overwrite: bool = False,
) -> None:
    """Train the adapter of one part and write it as a stock PEFT directory with training.csv and training.json.

    Frozen weights are in `dtype`, LoRA weights and the loss in float32. Backpropagation ends at the lowest adapted
    layer. On the CPU the same settings give the same bytes for the same number of threads; on a GPU, kernels that sum
    in varying order do not promise that.

    Args:
        stage: "A" (adapts kept layers), "B" or "C" (adapts that bundle's layers).
        student_dir: the A model for stage A, else the merged A.
        teacher_dir: the dense model; None trains on cross-entropy alone (kd_alpha 0), and no KL is measured.
        windows: training windows; their order is drawn anew for every pass over them.
        output_dir: the adapter's directory, written whole or not at all; that it can be is known before training.
        bundles: what to restore into the student: for B its bundle; for C the merged B and then C's bundle.
        states: what `teacher_states` wrote for the same windows; without it the teacher's layers run along.
        lora, loss, optimiser, dtype, device, seed: settings.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        overwrite: replace what is no adapter that was trained here, too; never an input.

    Raises:
        PipelineError: the output may not or cannot be written, see `outputs.claim` and `transaction.atomic_directory`.
        LayoutError, CheckpointError: the student or a bundle is not what the stage needs, or of another pruning.
        DataError: the teacher's states belong to other windows or another teacher.
        PipelineError: there is no teacher, and kd_alpha or states ask for one.
        NumberError: a loss, a gradient or a weight becomes NaN or infinity; nothing is written then.
    """
    if teacher_dir is None and (loss.kd_alpha or states):
        raise PipelineError("there is no teacher to learn from", where="teacher_dir", mend="name the dense model")
    read = [student_dir, teacher_dir, *bundles, states]
    check = claim([Output.directory(output_dir, "--output_dir", RECORD)], read, overwrite=overwrite)
    device = resolve_device(device)
    torch.manual_seed(seed)
    checkpoint = open_checkpoint(student_dir)
    if checkpoint.layout is None:
        raise CheckpointError("there is no manifest.json", where=student_dir, mend="give an A model or a merged A")
    layout = _told_by_bundles(checkpoint.layout, stage, bundles)
    layers = stage_layers(stage, layout)
    _check_restored(stage, layout, bundles)
    check_same_pruning([student_dir, *bundles])
    doubts = warn_of(checkpoint, windows)
    started = time.monotonic()
    # Entered before the training, which would be lost if its result could not be written.
    with atomic_directory(output_dir, check=check) as fresh:
        student = load_model(student_dir, dtype=dtype, device=device, bundles=tuple(bundles))
        model = _with_adapter(student, layers, lora)
        if gradient_checkpointing:
            # Reentrant checkpointing would need inputs that require gradients, and so a backward pass below the
            # adapter.
            student.activation_checkpointing_enable({"use_reentrant": False})
        teacher = None if teacher_dir is None else _Teacher(teacher_dir, windows, states, dtype, device)
        with reserved_space(fresh, _adapter_bytes(model), where=output_dir):
            curve = _fit(model.train(), teacher, windows, loss, optimiser, random.Random(seed), device)
        model.save_pretrained(fresh)
        curve.to_csv(fresh / "training.csv", index=False)
        about = {
            "command": "train",
            "stage": stage,
            "layers": list(layers),
            "student": {"dir": os.fspath(student_dir), "weights": weight_digests(student_dir)},
            "bundles": {os.fspath(b): weight_digests(b) for b in bundles},
            "pruning_identities": {os.fspath(part): read_identity(part) for part in (student_dir, *bundles)},
            "teacher": None if teacher is None else {"dir": os.fspath(teacher_dir), "weights": teacher.digests},
            "windows": asdict(windows.identity),
            "settings": {"lora": asdict(lora), "loss": asdict(loss), "optimiser": asdict(optimiser)},
            "dtype": torch_name(dtype),
            "seed": seed,
            "warnings": doubts,
            "seconds": round(time.monotonic() - started, 1),
            "files": [*listed_files(fresh), RECORD.name],
            "versions": versions(PACKAGE, "torch", "transformers", "peft"),
        }
        write_json(fresh / RECORD.name, about)


def _adapter_bytes(model: PeftModel) -> int:
    """The size of an adapter's directory, at most."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + _SMALL_FILES


def _told_by_bundles(layout: Layout, stage: str, bundles: Sequence[str | Path]) -> Layout:
    """The layout, with B and C told by the bundles that are restored where the manifest leaves them open: B, then C."""
    if not layout.unassigned:
        return layout
    # From the end: C's student has one bundle where B holds no layers.
    parts = reversed("BC"[: "ABC".index(stage)])
    held = {part: bundle_layers(bundle) for part, bundle in zip(parts, reversed(bundles), strict=False)}
    return layout.assigned(held, where="--bundle")


def _check_restored(stage: str, layout: Layout, bundles: Sequence[str | Path]) -> None:
    """Raise a LayoutError unless the bundles restore exactly the layers that the stage's student has."""
    restored = {layer for bundle in bundles for layer in open_checkpoint(bundle).layers}
    wanted = {layer for part in "BC"[: "ABC".index(stage)] for layer in layout.layers_of(part)}
    if restored != wanted:
        raise LayoutError(
            f"the student of stage {stage} restores layers {sorted(wanted)}, the bundles hold {sorted(restored)}",
            where="--bundle",
            mend={
                "A": "give no bundle for stage A",
                "B": "give bundle B for stage B, and no other",
                "C": "give the merged bundle B and bundle C for stage C",
            }[stage],
        )


def _with_adapter(student: PreTrainedModel, layers: Sequence[int], lora: LoraSettings) -> PeftModel:
    """The student with a fresh adapter on some layers; nothing else can be trained.

    Raises:
        AdapterError: a target module is not a projection of the layers, which PEFT would pass over in silence.
    """
    modules = student.model.layers[layers[0]].named_modules()
    known = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    unknown = sorted(set(lora.target_modules) - known)
    if unknown:
        raise AdapterError(
            f"there are no modules {', '.join(unknown)} in the layers",
            where="target_modules",
            mend=f"use some of {', '.join(sorted(known))}",
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        layers_to_transform=list(layers),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, config)


class _Teacher:
    """The dense model's logits: its head applied to stored states, or the whole model where there are none."""

    def __init__(self, teacher_dir, windows: Windows, states, dtype: torch.dtype, device) -> None:
        self.digests, self._device, self._windows = weight_digests(teacher_dir), device, windows
        self._states = open_teacher_states(states, windows, self.digests) if states else None
        if self._states is None:
            self._model = load_model(teacher_dir, dtype=dtype, device=device).requires_grad_(False)
            self.head = self._model.lm_head.weight
        else:
            checkpoint = open_checkpoint(teacher_dir)
            self.head = checkpoint.read(head_name(checkpoint), dtype).to(device)

    @torch.no_grad()
    def hidden(self, chosen: Sequence[int]) -> torch.Tensor:
        """Final hidden states of some windows, shape (n, seqlen, hidden)."""
        if self._states is None:
            ids = self._windows.ids[list(chosen)].long().to(self._device)
            return self._model.model(ids, use_cache=False).last_hidden_state
        return torch.cat([self._states.read(i, i + 1) for i in chosen]).to(self._device)


def _fit(
    model: PeftModel,
    teacher: _Teacher | None,
    windows: Windows,
    loss: LossSettings,
    settings: OptimiserSettings,
    order: random.Random,
    device,
) -> pd.DataFrame:
    """The training loop; one row a step: step, loss, kl, ce (means over tokens), learning_rate, grad_norm, tokens.

    Raises:
        NumberError: a loss or the gradient's norm is NaN or infinity, at once; or a weight is, at the end.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    updater = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    batches = _endless_batches(len(windows.ids), settings.batch_size, order)
    rows = []
    with progress(total=settings.steps, description="train", unit="step") as bar:
        for step in range(settings.steps):
            rate = settings.learning_rate * _schedule(step, settings)
            for group in updater.param_groups:
                group["lr"] = rate
            sums, tokens = torch.zeros(3, dtype=torch.float64), 0
            chosen = [next(batches) for _ in range(settings.gradient_accumulation)]
            total = sum(len(batch) for batch in chosen) * (windows.seqlen - 1)
            for batch in chosen:
                ids = windows.ids[batch].long().to(device)
                sums += _backward(model, teacher, ids, teacher and teacher.hidden(batch), loss, total)
                tokens += ids.numel()
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            updater.step()
            updater.zero_grad(set_to_none=True)
            mean, length = (sums / total).tolist(), float(norm)
            told = dict(zip(("loss", "KL", "cross-entropy"), mean, strict=True), gradient=length)
            _check_step(step + 1, told if teacher else {name: v for name, v in told.items() if name != "KL"})
            rows.append((step + 1, *mean, rate, length, tokens))
            bar.set_postfix_str(f"loss {mean[0]:.4f}", refresh=False)
            bar.update()
    if not all(all_finite(weight) for weight in trained):
        raise NumberError(f"after {settings.steps} steps weights are NaN or infinity", mend=_CALMER)
    return pd.DataFrame(rows, columns=["step", "loss", "kl", "ce", "learning_rate", "grad_norm", "tokens"])


def _check_step(step: int, values: Mapping[str, float]) -> None:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise NumberError(f"the {wrong[0]} of step {step} is {values[wrong[0]]}, so training ends here", mend=_CALMER)


def _backward(model, teacher: _Teacher | None, ids, taught, loss: LossSettings, total: int) -> torch.Tensor:
    """Add the gradients of one batch; returns loss, KL and cross-entropy summed over its tokens, float64.

    The head and the loss go in blocks of tokens. Each block's gradient stops at the final hidden states; one backward
    pass through the layers follows, so logits of more than a block never exist.
    """
    decoder, head = model.get_base_model().model, model.get_base_model().lm_head
    hidden = decoder(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets, expected = ids[:, 1:].flatten(), None
    taught = teacher and taught[:, :-1].flatten(0, 1)
    cut = hidden.detach().requires_grad_(True)
    sums = torch.zeros(3, dtype=torch.float64)
    block = max(1, _BLOCK_LOGITS // head.weight.shape[0])
    for start in range(0, len(targets), block):
        part = slice(start, start + block)
        if teacher:
            with torch.no_grad():
                expected = functional.linear(taught[part], teacher.head)
        parts = distillation_loss(head(cut[part]), expected, targets[part], loss)
        (parts[0] / total).backward()
        sums += torch.stack([p.detach().double().cpu() for p in parts])
    hidden.backward(cut.grad)
    return sums


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
