"""Weights with NaN or infinity are refused as they stream by, whether they are merged or copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_oracle import LAYOUT, PROJECTIONS, edit_tensors, random_adapter, save_base

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.storage.dtypes import DTYPES
from mistral_prune_lora.storage.finite import all_finite_bytes

LORA = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
MERGED, COPIED = "model.layers.4.mlp.up_proj.weight", "lm_head.weight"


def is_finite(bits: np.ndarray, dtype: str) -> np.ndarray:
    """What torch says of numbers that are given as whole numbers of the same size."""
    values = torch.from_numpy(bits.view(np.uint8)).view(DTYPES[dtype])
    return torch.isfinite(values if DTYPES[dtype].itemsize > 1 else values.float()).numpy()


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_is_told(dtype):
    """Alone and in the company of finite ones; of 32 and 64 bits, those around every power of two."""
    width = DTYPES[dtype].itemsize
    if width <= 2:
        patterns = np.arange(1 << (8 * width), dtype=f"u{width}")
    else:
        near = [(1 << i) + d for i in range(8 * width) for d in (-1, 0, 1)]
        exponents = torch.tensor([0.0, 1.0, torch.inf, torch.nan, torch.finfo(DTYPES[dtype]).max], dtype=DTYPES[dtype])
        found = exponents.numpy().view(f"u{width}").tolist()
        numbers = [n for x in (*near, *found) for n in (x - 1, x, x + 1)]
        sign = 1 << (8 * width - 1)
        patterns = np.array([n & (2 * sign - 1) ^ s for n in numbers for s in (0, sign)], dtype=f"u{width}")
    finite = is_finite(patterns, dtype)
    assert 0 < finite.sum() < len(finite)
    assert all_finite_bytes(patterns[finite].view(np.uint8), dtype)
    company = patterns[finite][:5]
    for pattern in patterns[~finite]:
        for data in ([pattern], [*company, pattern], [pattern, *company]):
            assert not all_finite_bytes(np.array(data, dtype=patterns.dtype).view(np.uint8), dtype), hex(pattern)


def test_whole_numbers_are_none_of_its_business():
    ones = np.full(64, 255, dtype=np.uint8)
    assert all(all_finite_bytes(ones, dtype) for dtype in DTYPES if dtype not in FLOATS)
    assert not any(all_finite_bytes(ones, dtype) for dtype in FLOATS)
    assert all(all_finite_bytes(ones[:0], dtype) for dtype in DTYPES)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[torch.dtype, Path]:
    folder = tmp_path_factory.mktemp("originals")
    made = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        made[dtype] = folder / str(dtype)
        dense, _ = save_base(made[dtype], dtype)
        random_adapter(made[dtype] / "adapter", dense, LORA, layers=LAYOUT.kept)
    return made


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [MERGED, COPIED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_weight_that_is_not_finite_is_refused(dtype, name, value, verify, originals, tmp_path):
    base = tmp_path / "A"
    shutil.copytree(originals[dtype] / "A", base)
    edit_tensors(base / "model.safetensors", lambda tensors: tensors[name].view(-1)[-3:-2].fill_(value))
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity"):
        merge_adapters(base, [originals[dtype] / "adapter"], tmp_path / "out", verify=verify)
    assert list(tmp_path.iterdir()) == [base]


def test_a_merge_that_overflows_is_refused(originals, tmp_path):
    """The largest float16 with something added; in bfloat16 there is room for it."""
    for dtype in (torch.float16, torch.bfloat16):
        base = tmp_path / str(dtype)
        shutil.copytree(originals[dtype] / "A", base)
        edit_tensors(base / "model.safetensors", lambda tensors: tensors[MERGED].fill_(65504))
        adapter = shutil.copytree(originals[dtype] / "adapter", tmp_path / f"adapter {dtype}")
        factor = f"base_model.model.{MERGED.removesuffix('weight')}lora_"
        edit_tensors(
            adapter / "adapter_model.safetensors",
            lambda tensors, factor=factor: [tensors[f"{factor}{x}.weight"].fill_(9) for x in "AB"],
        )
    with pytest.raises(CheckpointError, match=f"tensor {MERGED} gets NaN or infinity by the merge, in F16"):
        merge_adapters(tmp_path / "torch.float16", [tmp_path / "adapter torch.float16"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_adapters(tmp_path / "torch.bfloat16", [tmp_path / "adapter torch.bfloat16"], tmp_path / "out")
