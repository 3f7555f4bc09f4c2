"""What PEFT makes of a model and an adapter, and the models and adapters to try it on."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from cut_model import cut, save_dense
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer
from transformers import AutoModelForCausalLM

from mistral_prune_lora.layout.partition import Layout

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_OF_ALL = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS}
LAYOUT = Layout(5, (1, 2), (3,))


def save_base(folder: Path, dtype: torch.dtype, layout: Layout = LAYOUT, **shape) -> tuple[Path, dict[str, Path]]:
    """(a dense model, the directories of its parts); A has a tokenizer."""
    dense = save_dense(folder / "dense", dtype=dtype, num_hidden_layers=layout.num_layers, **shape)
    a, bundles = cut(dense, layout, folder, dtype)
    save_tokenizer(a)
    return dense, {"A": a, **bundles}


def random_adapter(
    folder: Path,
    base: Path,
    settings: dict,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: Iterable[int] | None = None,
) -> Path:
    """An adapter as PEFT writes it for a base model, all its tensors random; settings go to LoraConfig.

    With `layers`, B is zero in all others, as trainers leave it that save every layer.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    # PEFT corrects this flag before it saves it; a config that still has it set must do no harm.
    config["fan_in_fan_out"] = settings.get("fan_in_fan_out", False)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    tensors = {n: (torch.randn(t.shape) * 0.1 + ("magnitude" in n)).to(dtype) for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder if layers is None else zero_outside(folder, layers)


def zero_outside(adapter: Path, layers: Iterable[int], copy: Path | None = None) -> Path:
    """Set an adapter's B to zero outside of some layers, in place or in a copy; returns its directory."""
    folder = shutil.copytree(adapter, copy) if copy else adapter
    inside = tuple(f".layers.{i}." for i in layers)

    def change(tensors):
        for name in [n for n in tensors if ".lora_B." in n and ".layers." in n and not any(i in n for i in inside)]:
            tensors[name].zero_()

    edit_tensors(folder / "adapter_model.safetensors", change)
    return folder


def peft_merged(base: Path, adapters: list[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights after PEFT's merge_and_unload, adapter after adapter, with PEFT's defaults."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def read_result(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model or bundle directory, read by the safetensors library, by their names in the model."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        prefix = f"model.layers.{int(file.stem[6:])}." if file.stem.startswith("layer_") else ""
        tensors |= {prefix + name: tensor for name, tensor in load_file(file).items()}
    return tensors


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
