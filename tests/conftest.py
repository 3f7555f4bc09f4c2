"""Fixtures that every test shares: tiny random models, their pruned form, adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from transformers import MistralForCausalLM

from mistral_prune_lora.layout import Layout


@pytest.fixture
def layout() -> Layout:
    """B holds layers 3 and 4, C holds 5 and 6."""
    return Layout(8, (3, 4), (5, 6))


@pytest.fixture
def dense_dir(tmp_path: Path) -> Path:
    """A dense random bf16 model as transformers saves it, without a tokenizer."""
    torch.manual_seed(0)
    model = MistralForCausalLM(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"
