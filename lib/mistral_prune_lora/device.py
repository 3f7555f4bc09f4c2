"""Where to compute, and how much of the machine to use there."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass

import torch

from mistral_prune_lora.errors import DeviceError
from mistral_prune_lora.gpus import batch_job, own_gpu

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


@dataclass(frozen=True)
class Granted:
    """What a job of the workflow computes with.

    Attributes:
        device: a name as for `resolve_device`.
        memory_bytes: for weights and activations; None lets the free memory decide.
    """

    device: str
    memory_bytes: int | None


def granted(threads: int, gpus: int | None, mem_mb: int | None) -> Granted:
    """Take what a job was granted: use so many threads, and say in one line on stderr what is computed with.

    Of several GPUs on one machine it takes one that no other job holds, and waits until there is one. What a batch job
    sees is its own: the cluster has decided.

    Args:
        threads: Snakemake's `threads`.
        gpus: how many GPUs; None where nothing says, which takes one if there is one.
        mem_mb: megabytes of memory; None where nothing says.

    Raises:
        DeviceError: a batch job was granted a GPU that torch cannot use. Elsewhere that is only said, loudly: a profile
            for one machine grants its GPU whether it has one or not. The locks on GPUs cannot be taken.
    """
    use_threads(threads)
    device = resolve_device("auto" if gpus or gpus is None else "cpu")
    if device.type == "cuda" and torch.cuda.device_count() > 1 and batch_job() is None:
        device = torch.device("cuda", own_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if gpus and device.type == "cpu":
        _say_without_gpu(threads)
    given = "as much as is free" if mem_mb is None else f"{mem_mb / 1000:.1f} GB"
    print(f"device {device}, {_counted(threads)}, memory {given}", file=sys.stderr)
    # On a GPU it is another memory than the one that was granted.
    if mem_mb is None or device.type != "cpu":
        return Granted(str(device), None)
    return Granted(str(device), max(mem_mb * 10**6 - _PROCESS_BYTES, mem_mb * 10**6 // 2))


def use_threads(count: int) -> None:
    """Let torch compute with so many threads, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(count)


def _say_without_gpu(threads: int) -> None:
    """Say that torch sees no GPU where one was granted: on a cluster as an error, since others wait for that GPU."""
    where = batch_job()
    if where is None:
        told = f"GRANTED A GPU, BUT TORCH SEES NONE: computing on the CPU with {_counted(threads)}"
        print(told, file=sys.stderr)
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise DeviceError(
        f"was granted a GPU, and torch can use none: torch {torch.__version__} {built}, CUDA_VISIBLE_DEVICES is"
        f" {'not set' if visible is None else repr(visible)}",
        where=where,
        mend="install the torch for this node's driver and ask for the GPU as the site wants it, or set gpu to 0 for"
        " this rule in the profile",
    )


def _counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"
