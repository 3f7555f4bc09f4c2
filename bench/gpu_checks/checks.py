"""All checks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpu_checks.evaluation import check_bf16, check_float32
from gpu_checks.finding import Finding
from gpu_checks.memory import check_memory
from gpu_checks.merge import check_merge
from gpu_checks.resume import check_resume
from gpu_checks.setting import Setting
from gpu_checks.training import check_training

CHECKS: dict[str, Callable[[Setting], Iterator[Finding]]] = {
    "merge": check_merge,
    "evaluation-fp32": check_float32,
    "evaluation-bf16": check_bf16,
    "training": check_training,
    "resume": check_resume,
    "memory": check_memory,
}
