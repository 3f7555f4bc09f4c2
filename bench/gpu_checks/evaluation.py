"""Streamed evaluation of A, AB and FULL: beside whole models in transformers, with and without overlap, its times."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpu_checks import plain
from gpu_checks.finding import Finding, deviation, same_bits, within
from gpu_checks.setting import Setting, exact_float32
from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.models.window_scores import head_bytes
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.memory import working_bytes
from mistral_prune_lora.streaming.passage import embedding_bytes

STAGES = ("A", "AB", "FULL")
TURNS = 2
# Of a window's NLL, and of hidden states by the largest of them: kernels may be chosen otherwise for another shape, and
# what sums in another order rounds otherwise. Two layers that change places move the NLL of a random model by 1e-3 and
# its hidden states by tenths.
NLL_BOUND = {"fp32": 1e-5, "bf16": 5e-4}
HIDDEN_BOUND = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation has given.

    Attributes:
        nll: of each window by stage, float64, shape (windows,).
        hidden: the final hidden states of FULL before the norm, shape (windows, seqlen, hidden).
        seconds: that it took.
    """

    nll: dict[str, torch.Tensor]
    hidden: torch.Tensor
    seconds: float

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, without the time."""
        return {**self.nll, "final hidden states": self.hidden}


def check_float32(setting: Setting) -> Iterator[Finding]:
    """Evaluation in float32, without TF32."""
    with exact_float32():
        yield from _check(setting, "fp32")


def check_bf16(setting: Setting) -> Iterator[Finding]:
    """Evaluation in bf16."""
    yield from _check(setting, "bf16")


def compute_of(setting: Setting, dtype: torch.dtype, *, overlap: bool) -> Compute:
    """As a command would compute, with just the memory for `size.resident` layers at once."""
    compute = Compute(setting.device, dtype, setting.size.batch, overlap=overlap)
    model = open_checkpoint(setting.dense)
    beside = embedding_bytes(model, compute) + head_bytes(model, dtype)
    beside += working_bytes(compute, setting.config, setting.size.seqlen)
    memory = beside + setting.size.resident * LayerSource(0, model).nbytes(dtype)
    return Compute(setting.device, dtype, setting.size.batch, memory, overlap)


def evaluate(setting: Setting, compute: Compute) -> Evaluated:
    """All three stages as the evaluation command runs them, in a folder that is deleted."""
    parts = setting.parts
    subject = Subject.open(parts["A"], {part: parts[part] for part in "BC"})
    with tempfile.TemporaryDirectory(dir=setting.folder) as work:
        final = f"{work}/final"
        setting.synchronise()
        began = time.perf_counter()
        told = {"work_dir": work, "final_hidden": final}
        results = list(evaluate_stages(subject, STAGES, setting.windows, compute, **told))
        setting.synchronise()
        seconds = time.perf_counter() - began
        hidden = ActivationReader(final).read(0, len(setting.windows)).clone()
    nll = {stage: torch.from_numpy(r.scores.nll) for stage, r in zip(STAGES, results, strict=True)}
    return Evaluated(nll, hidden, seconds)


def _check(setting: Setting, name: str) -> Iterator[Finding]:
    dtype = COMPUTE_DTYPES[name]
    overlapping, alone = _in_turn(setting, dtype)
    yield same_bits(f"{name}: streamed with and without overlap", overlapping.tensors, alone.tensors)
    yield from _beside_plain(setting, name, overlapping)
    tokens = setting.windows.ids.numel()
    for words, seconds in (("with", overlapping.seconds), ("without", alone.seconds)):
        yield Finding(f"{name}: A, AB, FULL {words} overlap, {tokens} tokens", f"{seconds:.2f} s")


def _in_turn(setting: Setting, dtype: torch.dtype) -> tuple[Evaluated, Evaluated]:
    """With overlap and without, in turn; the shortest of each one's times, after one that counts for neither."""
    computes = [compute_of(setting, dtype, overlap=overlap) for overlap in (True, False)]
    evaluate(setting, computes[0])  # reads files into the page cache, digests them, starts the device
    turns = [[evaluate(setting, compute) for compute in computes] for _ in range(TURNS)]
    first, second = (min(each, key=lambda run: run.seconds) for each in zip(*turns, strict=True))
    return first, second


def _beside_plain(setting: Setting, name: str, ours: Evaluated) -> Iterator[Finding]:
    for stage in STAGES:
        model = plain.with_layers(
            setting.dense, setting.size.layout.active(stage), COMPUTE_DTYPES[name], setting.device
        )
        nll, hidden = plain.evaluated(model, setting.windows.ids, setting.size.batch)
        away = float(((ours.nll[stage] - nll) / nll).abs().max())
        yield within(f"{name}: NLL of a window of {stage} beside transformers", away, NLL_BOUND[name])
    differ = int((ours.hidden != hidden).sum())
    away = within("", deviation(ours.hidden, hidden), HIDDEN_BOUND[name])
    words = f"{name}: final hidden states of FULL beside transformers"
    yield Finding(words, f"{away.figure}; {differ} of {hidden.numel()} differ", away.bound, away.ok)
