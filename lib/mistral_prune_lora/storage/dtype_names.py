"""Dtypes by name: what a file's header says of them, for those who read headers alone. Imports no torch."""

from __future__ import annotations

# By the names of the safetensors format, in the order of its library's own enumeration, which its writer sorts by.
ITEMSIZES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
# Those that a model computes and is stored in, by the names on a command line and in a configuration.
COMPUTE = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
FLOATS = tuple(COMPUTE.values())  # anything else is quantised, or no weight
