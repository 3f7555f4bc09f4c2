"""Fixtures that every test shares: tiny random models, their pruned form, adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from mistral_prune_lora.layout import Layout


def tiny_config(**changes) -> MistralConfig:
    """A Mistral of 8 layers and hidden size 64; its head size differs from hidden / heads on purpose."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 256,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return MistralConfig(**{**settings, **changes})


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
