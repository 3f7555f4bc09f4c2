"""Where to compute."""

from __future__ import annotations

import torch

from mistral_prune_lora.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """The torch device of a `--device` value; "auto" means the first GPU if there is one, else the CPU.

    Raises:
        DeviceError: not a device, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is not a device", where="--device", mend="use auto, cpu or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"{name} is not there: this machine has {torch.cuda.device_count()} CUDA devices",
            where="--device",
            mend="use --device cpu, or run on a machine with a GPU",
        )
    return device
