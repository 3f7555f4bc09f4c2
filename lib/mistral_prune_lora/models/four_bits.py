"""A model whose weights are quantised to four bits as they are loaded, by bitsandbytes, on a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from mistral_prune_lora.errors import DeviceError


def load_in_four_bits(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cuda:0"
) -> PreTrainedModel:
    """Load a dense model with NF4 weights, which compute in `dtype`; embedding, norms and head stay as they are.

    Args:
        path: a model directory without dropped layers.
        dtype: of the arithmetic.
        device: a GPU.

    Raises:
        DeviceError: the device is no GPU, or bitsandbytes is not installed.
    """
    check_four_bits(device)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=dtype, device_map={"": torch.device(device)}, trust_remote_code=False
    )
    return model.eval()


def check_four_bits(device: torch.device | str) -> None:
    """Raise a DeviceError unless a model can be quantised to four bits on a device."""
    place = torch.device(device)
    missing = [] if place.type == "cuda" else [f"the device is {place}"]
    missing += [] if importlib.util.find_spec("bitsandbytes") else ["the package bitsandbytes is not installed"]
    if missing:
        raise DeviceError(
            f"a teacher of four bits needs a GPU and bitsandbytes: {' and '.join(missing)}",
            where="--teacher_4bit",
            mend="leave it out; --teacher_states FILE runs the teacher before the student is loaded",
        )
