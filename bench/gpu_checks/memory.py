"""Peak memory on the device: streamed evaluation within what it was allowed, a training step beside a plain one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_checks import evaluation, training
from gpu_checks.finding import NOT_HAD, Finding
from gpu_checks.peak import Peak
from gpu_checks.setting import Setting, exact_float32


def check_memory(setting: Setting) -> Iterator[Finding]:
    """In float32. On a CPU, where torch counts nothing, everything runs and no figure is told."""
    with exact_float32():
        for overlap in (True, False):
            compute = evaluation.compute_of(setting, torch.float32, overlap=overlap)
            with Peak(setting.device) as peak:
                evaluation.evaluate(setting, compute)
            words = f"fp32: peak of streamed evaluation {'with' if overlap else 'without'} overlap"
            yield _at_most(words, peak.nbytes, compute.memory, "--max_memory")
        training.store_states(setting, "fp32")
        with Peak(setting.device) as ours:
            training.step(setting, "fp32")
        with Peak(setting.device) as plainly:
            training.plain_step(setting)
        yield _at_most("fp32: peak of a training step", ours.nbytes, plainly.nbytes, "plain's")


def _at_most(what: str, nbytes: int | None, bound: int | None, words: str) -> Finding:
    if nbytes is None or bound is None:
        return Finding(what, NOT_HAD, f"at most {words}")
    return Finding(what, f"{nbytes / 1e9:.3f} GB", f"at most {words}, {bound / 1e9:.3f} GB", nbytes <= bound)
