"""The merge command on the device, beside PEFT's merge on the same device and the command on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from gpu_checks import plain
from gpu_checks.finding import Finding, largest, same_bits, within
from gpu_checks.setting import Setting, exact_float32
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge_command

# A step of bf16 at a number is at most 2^-7 of it. What cancels to almost nothing may differ by float32's own rounding.
BF16_STEP, CANCELLED = 2.0**-7, 1e-6


def check_merge(setting: Setting) -> Iterator[Finding]:
    """Weights of A with an adapter merged: PEFT's bits on the same device, and the CPU's within a step of bf16."""
    with exact_float32():
        ours = _merged(setting, str(setting.device))
        theirs = plain.merged(setting.parts["A"], setting.adapter, setting.device)
    yield same_bits("merge of A beside PEFT's on this device", ours, {name: theirs[name] for name in ours})
    del theirs
    yield _beside_cpu(ours, _merged(setting, "cpu"))


def _merged(setting: Setting, device: str) -> dict[str, torch.Tensor]:
    """What the command writes with `--device`."""
    output = setting.folder / "merged"
    shutil.rmtree(output, ignore_errors=True)
    words = ["--base_model", setting.parts["A"], "--adapter_path", setting.adapter, "--output_dir", output]
    if merge_command([*map(str, words), "--device", device]):
        raise RuntimeError(f"the merge command failed on {device}; it has said why")
    tensors = _tensors(output)
    shutil.rmtree(output)
    return tensors


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    # Copied, since what load_file gives lies in files that are deleted.
    return {name: t.clone() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def _beside_cpu(ours: dict[str, torch.Tensor], cpu: dict[str, torch.Tensor]) -> Finding:
    """The largest difference from the CPU's numbers, in steps of bf16."""
    steps = []
    for name, wanted in cpu.items():
        away = (ours[name].float() - wanted.float()).abs()
        steps.append(float((away / (wanted.float().abs() * BF16_STEP + CANCELLED)).max()))
    return within("merge of A beside the CPU's", largest(steps), 1.0, " steps of bf16")
