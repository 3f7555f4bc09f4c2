"""A dense model cut into A and bundles with nothing but the safetensors library; plain transformers beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.descriptions import make_manifest
from mistral_prune_lora.checkpoints.directories import layer_file_name
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.identity import PassLayer
from mistral_prune_lora.text.sources import Text
from mistral_prune_lora.text.windows import Windows, WindowsIdentity, ids_digest


def save_dense(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config) -> Path:
    """A random dense model, weights large enough for attention to matter; config goes to `tiny_config`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.08, **config), dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):  # where they start they change nothing
            weight.data += torch.randn(weight.shape) / 4
    model.to(dtype).save_pretrained(folder)
    return folder


def cut(dense: Path, layout: Layout, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, dict[str, Path]]:
    """Write folder/A and folder/bundles/{B,C}; returns them. A part without layers gets no bundle."""
    state = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).state_dict()
    config = json.loads((dense / "config.json").read_text())
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    a = folder / "A"
    a.mkdir(parents=True)
    dropped = tuple(f"model.layers.{i}." for i in layout.dropped)
    kept = {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(dropped or ("\0",))}
    save_file(kept, a / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (dense / name).is_file():
            shutil.copy(dense / name, a)
    manifest = make_manifest(layout, base_model=str(dense), model_type=config["model_type"], selection={}, artifacts={})
    (a / "manifest.json").write_text(json.dumps(manifest))
    bundles = {}
    for part in "BC":
        if not layout.layers_of(part):
            continue
        bundles[part] = folder / "bundles" / part
        bundles[part].mkdir(parents=True)
        for i in layout.layers_of(part):
            prefix = f"model.layers.{i}."
            layer = {n.removeprefix(prefix): t.contiguous() for n, t in state.items() if n.startswith(prefix)}
            save_file(layer, bundles[part] / layer_file_name(i))
        meta = {"indices": list(layout.layers_of(part)), "format": "safetensors", "granularity": "layer"}
        (bundles[part] / "bundle_meta.json").write_text(json.dumps(meta))
    return a, bundles


def make_compact(a: Path, layout: Layout) -> None:
    """Rewrite A as a writer does that counts the kept layers 0, 1, 2 ...; the manifest stays."""
    renamed = {}
    for name, tensor in load_file(a / "model.safetensors").items():
        words = name.split(".")
        if words[1] == "layers":
            words[2] = str(layout.kept.index(int(words[2])))
        renamed[".".join(words)] = tensor
    save_file(renamed, a / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((a / "config.json").read_text())
    (a / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(layout.kept)}))


def random_windows(count: int, seqlen: int, vocabulary: int = 96, seed: int = 1) -> Windows:
    """Windows of random ids."""
    ids = torch.randint(vocabulary, (count, seqlen), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    identity = WindowsIdentity(
        "random", "test", "nowhere", "0" * 64, ids_digest(ids), "none", "0" * 64, count * seqlen, seqlen, count, count
    )
    return Windows(ids, identity)


def text_of(content: str) -> Text:
    return Text("corpus", "test", content, hashlib.sha256(content.encode()).hexdigest(), "a test")


@torch.inference_mode()
def plain_stage(
    dense: Path, active: tuple[int, ...], windows: Windows, dtype: torch.dtype, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole model in transformers with PassLayers at the inactive layers.

    Returns:
        Final hidden states before the norm, and the NLL of each window: float32 cross-entropy, float64 sums.
    """
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    for i in set(range(len(model.model.layers))) - set(active):
        model.model.layers[i] = PassLayer(i)
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0].clone()))
    nll = []
    for start in range(0, len(windows), batch_size):
        ids = windows.ids[start : start + batch_size].long()
        logits = model(ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        nll.append(loss.double().sum(1))
    return torch.cat(before_norm), torch.cat(nll)
