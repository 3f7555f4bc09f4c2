"""Where to compute, and how much of the machine to use there."""

from __future__ import annotations

import os
import re

import torch

from mistral_prune_lora.errors import DeviceError

_DEVICE = re.compile(r"cpu|cuda(:\d{1,2})?")
_PROCESS_BYTES = 800_000_000  # Python with torch and transformers imported, and their buffers


def resolve_device(name: str) -> torch.device:
    """The torch device of a `--device` value; "auto" means the first GPU if there is one, else the CPU.

    Raises:
        DeviceError: not a device that is computed on here, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    # Of torch's other devices, meta computes nothing and would give numbers of nothing.
    if not _DEVICE.fullmatch(name):
        raise DeviceError(f"{name!r} is not a device", where="--device", mend="use auto, cpu or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"{name} is not there: this machine has {torch.cuda.device_count()} CUDA devices",
            where="--device",
            mend="use --device cpu, or run on a machine with a GPU",
        )
    return device


def granted_device(gpus: int) -> str:
    """The device of a job that was granted so many GPUs: "auto" with one, else "cpu".

    A job that was granted a GPU on a machine without any has the machine to itself, since the scheduler hands the GPU
    to one job at a time. It then uses every core it may run on, whatever OMP_NUM_THREADS was set to.
    """
    if gpus and not torch.cuda.is_available():
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return "auto" if gpus else "cpu"


def granted_memory(mem_mb: int | None, device: str) -> int | None:
    """Bytes for weights and activations of a job that was granted `mem_mb` megabytes of memory.

    None (let the free memory decide) without a grant, and on a GPU, whose memory is not what was granted.
    """
    if mem_mb is None or resolve_device(device).type != "cpu":
        return None
    return max(mem_mb * 10**6 - _PROCESS_BYTES, mem_mb * 10**6 // 2)
