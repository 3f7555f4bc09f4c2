"""The checks of bench/gpu_checks on the first GPU, at a size that takes minutes; skipped where there is none."""

import tempfile
from pathlib import Path

import gpu  # first: it says where the library lies, and how torch is to start
import pytest
import torch
from gpu_checks.checks import CHECKS
from gpu_checks.setting import LARGE, Setting

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="torch sees no GPU; the same checks on the CPU: python bench/gpu.py --device cpu --small",
)


@pytest.fixture(scope="module")
def setting():
    # Not pytest's own folder, of which the last three would be kept: these are gigabytes.
    with tempfile.TemporaryDirectory() as folder:
        yield Setting(torch.device("cuda:0"), LARGE, Path(folder))


@pytest.mark.parametrize("name", CHECKS)
def test_figures_are_within_their_bounds(name, setting, found):
    rows = list(gpu.rows(name, setting))
    found += rows
    failed = [f"{what.what}: {what.figure} ({what.bound})" for _, what, _ in rows if what.ok is False]
    assert rows and not failed, failed
