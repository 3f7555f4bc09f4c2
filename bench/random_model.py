"""Random models of a given geometry, written a tensor at a time: time and memory do not depend on what weights are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from mistral_prune_lora.checkpoints.descriptions import make_manifest
from mistral_prune_lora.checkpoints.directories import layer_file_name
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.architecture import empty_layer
from mistral_prune_lora.storage.safetensors_file import TensorSpec, write_file

_DEVIATION = 0.02


def mistral_config(
    *, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int
) -> MistralConfig:
    """A Mistral of this geometry, embeddings untied, without a sliding window."""
    return MistralConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def write_model(
    folder: Path, config: MistralConfig, layers: Sequence[int] | None = None, *, deviation: float = _DEVIATION
) -> Path:
    """Write a bf16 model directory with a tokenizer of single bytes; without the weights of layers not in `layers`."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    wanted = range(config.num_hidden_layers) if layers is None else layers
    absent = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers) if i not in wanted)
    specs = [TensorSpec(name, "BF16", tuple(s)) for name, s in shapes.items() if not name.startswith(absent or "\0")]
    _write(folder / "model.safetensors", specs, deviation)
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(folder)
    _save_byte_tokenizer(folder)
    return folder


def write_parts(folder: Path, config: MistralConfig, layout: Layout) -> tuple[Path, Path]:
    """Write A and its bundles without a dense model; returns the directories of A and of the bundles."""
    a = write_model(folder / "A", config, layout.kept)
    manifest = make_manifest(layout, base_model="random", model_type="mistral", selection={}, artifacts={})
    (a / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    layer = empty_layer(config, 0).state_dict()
    specs = [TensorSpec(name, "BF16", tuple(tensor.shape)) for name, tensor in layer.items()]
    for part in "BC":
        bundle = folder / "bundles" / part
        bundle.mkdir(parents=True)
        for index in layout.layers_of(part):
            _write(bundle / layer_file_name(index), specs)
        meta = {"indices": list(layout.layers_of(part)), "format": "safetensors", "granularity": "layer"}
        (bundle / "bundle_meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return a, folder / "bundles"


def _write(file: Path, specs: Sequence[TensorSpec], deviation: float = _DEVIATION) -> None:
    shapes = {spec.name: spec.shape for spec in specs}

    def produce(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, deviation)

    write_file(file, specs, produce)


def _save_byte_tokenizer(folder: Path) -> None:
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
