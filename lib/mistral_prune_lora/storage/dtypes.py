"""Dtypes by the names that people and files give them."""

from __future__ import annotations

import torch

from mistral_prune_lora.storage.dtype_names import COMPUTE

# By the names of the safetensors format.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Those that a model computes and is stored in, by the names on a command line and in a configuration.
COMPUTE_DTYPES = {name: DTYPES[stored] for name, stored in COMPUTE.items()}
COMPUTE_NAMES = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}


def torch_name(dtype: torch.dtype) -> str:
    """The name of a dtype in torch and in transformers' configurations: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
