"""A training that is killed after it has saved its state, and goes on: its bytes beside those of an undisturbed one.

`python -m gpu_checks.resume FOLDER DEVICE SIZE` is the process that is killed.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import load_file

import mistral_prune_lora
from gpu_checks.finding import Finding, deviation, largest, same_bits, within
from gpu_checks.setting import SIZES, Setting
from gpu_checks.training import store_states, training_settings
from mistral_prune_lora.distillation.prepare import TrainingData
from mistral_prune_lora.distillation.settings import Running
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.train import TrainingJob, train_adapter
from mistral_prune_lora.distillation.unfinished import State, Unfinished
from mistral_prune_lora.streaming.compute import Compute

STEPS, SAVED_EVERY, KILLED_AFTER_SAVES = 6, 2, 2
SPREAD = 10  # how much further than two undisturbed trainings from each other a resumed one may be


def check_resume(setting: Setting) -> Iterator[Finding]:
    """A training in bf16 that SIGKILL ends after step 4 of 6, started again.

    Torch is asked for deterministic kernels. Should the device have none for something, two undisturbed trainings
    differ; a resumed one must then be about as near to one of them as they are to each other.
    """
    store_states(setting, "bf16")
    first, second = (_trained(setting, f"undisturbed-{number}")[0] for number in (1, 2))
    yield _killed(setting)
    resumed, said = _trained(setting, "killed")
    wanted = f"goes on after step {SAVED_EVERY * KILLED_AFTER_SAVES} of {STEPS}"
    told = wanted if wanted in said else "it began anew"
    yield Finding("bf16: the killed training, started again", told, wanted, wanted in said)
    again = same_bits("bf16: adapters of two undisturbed trainings", first, second)
    yield Finding(again.what, again.figure)
    if again.ok:
        yield same_bits("bf16: adapter of the killed training", resumed, first)
        return
    spread, away = _away(second, first), _away(resumed, first)
    yield within("bf16: adapter of the killed training, of their distance", away / spread, SPREAD)


def _killed(setting: Setting) -> Finding:
    """Train in a process of its own until it is killed, and say how it ended."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()  # the other process wants memory of the same device
    size = next(name for name, size in SIZES.items() if size is setting.size)
    words = [sys.executable, "-m", "gpu_checks.resume", setting.folder, setting.device, size]
    paths = [Path(__file__).parents[1], Path(mistral_prune_lora.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))}
    run = subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True)
    there = (setting.folder / "killed.unfinished").is_dir() and not (setting.folder / "killed").exists()
    ok = run.returncode == -signal.SIGKILL and there
    figure = f"ended by {'SIGKILL' if ok else run.returncode}, the state {'' if there else 'not '}there"
    lines = run.stderr.strip().splitlines()[-1:] if not ok else []
    return Finding("bf16: a training is killed", "; ".join([figure, *lines]), "its state is there", ok)


def _trained(setting: Setting, name: str) -> tuple[dict[str, torch.Tensor], str]:
    """The adapter that a training ends with, and what was printed meanwhile."""
    with _deterministic(), redirect_stdout(io.StringIO()) as said:
        train_adapter(_job(setting, name))
    return load_file(setting.folder / name / "adapter_model.safetensors"), said.getvalue()


def _job(setting: Setting, name: str) -> TrainingJob:
    return TrainingJob(
        "A",
        Student(setting.parts["A"]),
        setting.dense,
        TrainingData(setting.trained, setting.folder / "teacher-bf16"),
        setting.folder / name,
        training_settings(setting, STEPS),
        Compute(setting.device, torch.bfloat16),
        running=Running(SAVED_EVERY),
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time, wherever torch has such; where it has none it warns."""
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former[0], warn_only=former[1])


def _away(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return largest(deviation(found[name], tensor) for name, tensor in wanted.items())


def _train_until_killed(folder: str, device: str, size: str) -> None:
    save, saves = Unfinished.save, 0

    def save_and_die(self: Unfinished, state: State) -> None:
        nonlocal saves
        save(self, state)
        saves += 1
        if saves == KILLED_AFTER_SAVES:
            os.kill(os.getpid(), signal.SIGKILL)

    Unfinished.save = save_and_die  # type: ignore[method-assign]
    _trained(Setting(torch.device(device), SIZES[size], Path(folder)), "killed")


if __name__ == "__main__":
    _train_until_killed(*sys.argv[1:])
