"""A GGUF file turned into a bf16 MistralForCausalLM directory whose float32 logits are the file's own.

Mistral's architecture is Llama's, plus an optional sliding window: the same tensors under the same names give the same
numbers. transformers reads (and dequantises) the file; what it read is put into the Mistral class and compared with
the model it came from before anything is rounded to bf16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mistral_prune_lora.checkpoints.directories import weight_files
from mistral_prune_lora.errors import SourceError
from mistral_prune_lora.layout.partition import MOST_LAYERS

ARCHITECTURES = ("llama", "mistral")
_CHECKED_TEXT = "The quick brown fox jumps over the lazy dog, and 42 of its friends follow."
_EMBEDDING, _NORM, _HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
_LAYER_TENSORS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)
# Without which the format says nothing of a model; transformers would take its own defaults for them.
_NEEDED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_FETCH_AGAIN = "fetch it again, or name another file"
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",  # the file's float32 value, not the decimal it was made from: the logits depend on it
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def convert_gguf(gguf: str | Path, output_dir: str | Path) -> dict:
    """Write config, generation config, bf16 weights and tokenizer of a GGUF model into an existing directory.

    Args:
        gguf: the file, of architecture llama or mistral, in any quantisation that transformers reads.
        output_dir: an existing directory.

    Returns:
        What the file says of itself: architecture, name, license.

    Raises:
        SourceError: not a GGUF file, another architecture, tensors that a Mistral does not have, or logits that differ
            from the source model's.
    """
    # The heavy imports come after the file is known to be worth them.
    gguf, output_dir = Path(gguf), Path(output_dir)
    description = _describe(gguf)

    import torch
    from transformers import (
        AutoModelForCausalLM,
        GenerationConfig,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
    )

    from mistral_prune_lora.models.architecture import renew_rotary_embedding

    with _damage_told(gguf), _answers_remembered():
        # Not AutoTokenizer: to learn the tokenizer's class it would read the file another way, ten times as long.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        ).eval()
    config = MistralConfig(
        **{name: getattr(source.config, name) for name in _KEPT}, sliding_window=description.pop("sliding_window")
    )
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    renew_rotary_embedding(model.model, "cpu")
    model.eval()

    ids = tokenizer(_CHECKED_TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if not torch.equal(source(ids).logits, model(ids).logits):
            raise SourceError(
                "the converted model's float32 logits differ from the source model's",
                where=gguf,
                mend="convert this model with its own tools and give its directory instead",
            )
    del source
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.bfloat16().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    # The safetensors library makes files that only their owner may read.
    for name in weight_files(output_dir):
        os.chmod(output_dir / name, (output_dir / "config.json").stat().st_mode)
    return description


@contextmanager
def _answers_remembered() -> Iterator[None]:
    """Let the gguf library answer the same question once while transformers reads a file.

    transformers parses the file twice and builds one and the same table of tensor names for each of its submodules,
    which together is half of the conversion's time.
    """
    import gguf

    asked = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in asked}
    try:
        for name, original in originals.items():
            setattr(gguf, name, cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextmanager
def _damage_told(gguf: Path) -> Iterator[None]:
    """Tell what a damaged file provokes in the libraries that read it, which is any kind of error, as a SourceError."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise SourceError(f"is not a GGUF file that can be read: {error}", where=gguf, mend=_FETCH_AGAIN) from None


def _describe(gguf: Path) -> dict:
    """Architecture, name, license and sliding window from the header; SourceError if it is not for us."""
    from transformers.integrations.gguf import read_gguf_metadata

    with _damage_told(gguf):
        metadata, tensors = read_gguf_metadata(str(gguf))
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise SourceError(
            f"holds a model of architecture {architecture!r}",
            where=gguf,
            mend=f"use one of architecture {' or '.join(ARCHITECTURES)}",
        )
    missing = [key for key in _NEEDED if f"{architecture}.{key}" not in metadata]
    if missing:
        raise SourceError(f"does not say {architecture}.{missing[0]}", where=gguf, mend=_FETCH_AGAIN)
    needed = _tensor_names(metadata[f"{architecture}.block_count"], gguf)
    foreign = [name for name in tensors if name not in needed | {_HEAD}]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if foreign or scaling != "none":
        what = f"tensor {foreign[0]}" if foreign else f"rope scaling of type {scaling!r}"
        raise SourceError(
            f"has {what}, which this conversion would lose",
            where=gguf,
            mend="convert this model with its own tools and give its directory instead",
        )
    absent = sorted(needed.difference(tensors))
    if absent or len(set(tensors)) < len(tensors):
        # transformers would make up what it does not find, and take the last of two.
        what = f"no tensor {absent[0]}" if absent else "two tensors of one name"
        raise SourceError(f"has {what}", where=gguf, mend=_FETCH_AGAIN)
    return {
        "architecture": architecture,
        "name": metadata.get("general.name"),
        "license": metadata.get("general.license"),
        "sliding_window": metadata.get(f"{architecture}.attention.sliding_window"),
    }


def _tensor_names(layers: object, gguf: Path) -> set[str]:
    """The tensors that a model of so many layers must have; SourceError if that is no number of layers."""
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise SourceError(f"counts {layers!r} layers, not from 1 to {MOST_LAYERS}", where=gguf, mend=_FETCH_AGAIN)
    return {_EMBEDDING, _NORM, *(f"blk.{i}.{part}.weight" for i in range(layers) for part in _LAYER_TENSORS)}
