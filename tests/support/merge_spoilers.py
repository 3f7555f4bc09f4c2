"""Ways to spoil a base model or an adapter, and what the merge says to each.

A spoiler is given a folder with a dense model, A, bundles, an adapter and a DoRA adapter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from merge_oracle import LAYOUT, PROJECTIONS, edit_json, edit_tensors, random_adapter, save_base
from safetensors.torch import load_file
from transformers import MistralForCausalLM

from mistral_prune_lora.checkpoints.descriptions import make_manifest
from mistral_prune_lora.layout.partition import Layout

WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS}


def set_config(**changes):
    return lambda there: edit_json(there / "adapter/adapter_config.json", **changes)


def set_tensors(change):
    return lambda there: edit_tensors(there / "adapter" / WEIGHTS, change)


def other_geometry(there: Path) -> None:
    dense, _ = save_base(there / "other", torch.bfloat16, hidden_size=32)
    shutil.rmtree(there / "adapter")
    random_adapter(there / "adapter", dense, LORA, layers=LAYOUT.kept)


def more_layers(there: Path) -> None:
    dense, _ = save_base(there / "other", torch.bfloat16, Layout(7))
    shutil.rmtree(there / "adapter")
    random_adapter(there / "adapter", dense, LORA)


def other_pruning(there: Path) -> None:
    _, parts = save_base(there / "other", torch.bfloat16, Layout(5, (2,), (3,)))
    manifest = make_manifest(Layout(5, (4,)), base_model="", model_type="mistral", selection={}, artifacts={})
    (parts["A"] / "manifest.json").write_text(json.dumps(manifest))
    edit_json(there / "adapter/adapter_config.json", base_model_name_or_path=str(parts["A"]))


def pickled(there: Path) -> None:
    tensors = load_file(there / "adapter" / WEIGHTS)
    (there / "adapter" / WEIGHTS).unlink()
    torch.save(tensors, there / "adapter/adapter_model.bin")


def sharded(there: Path) -> Path:
    MistralForCausalLM.from_pretrained(there / "dense", dtype="auto").save_pretrained(
        there / "sharded", max_shard_size="100KB"
    )
    for file in (there / "sharded").iterdir():
        shutil.move(file, there / "A" / file.name)
    (there / "A/model.safetensors").unlink()
    return there / "A/model.safetensors.index.json"


def missing_shard(there: Path) -> None:
    index = sharded(there)
    (there / "A" / json.loads(index.read_text())["weight_map"]["model.norm.weight"]).unlink()


def shard_outside(there: Path) -> None:
    index = sharded(there)
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../adapter/adapter_model.safetensors"
    index.write_text(json.dumps(content))


def unindexed_tensor(there: Path) -> None:
    index = sharded(there)
    content = json.loads(index.read_text())
    content["weight_map"]["model.more.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


def truncated(name: str, kept: float):
    def spoil(there: Path) -> None:
        content = (there / name).read_bytes()
        (there / name).write_bytes(content[: int(len(content) * kept)])

    return spoil


def long_header(there: Path) -> None:
    (there / "A/model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def in_base(change):
    return lambda there: edit_tensors(there / "A/model.safetensors", change)


def quantised(there: Path) -> None:
    def change(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)

    edit_tensors(there / "A/model.safetensors", change)


def without(*keys):
    return set_tensors(lambda tensors: [tensors.pop(key) for key in keys])


def with_tensor(key, tensor):
    return set_tensors(lambda tensors: tensors.update({key: tensor}))


def remove(name: str):
    def spoil(there: Path) -> None:
        shutil.rmtree(there / name) if (there / name).is_dir() else (there / name).unlink()

    return spoil


def broken_json(name: str):
    return lambda there: (there / name).write_text("{")


def dora_without_magnitude(there: Path) -> None:
    shutil.rmtree(there / "adapter")
    shutil.copytree(there / "dora", there / "adapter")
    edit_tensors(there / "adapter" / WEIGHTS, lambda tensors: tensors.pop(f"{FIRST}.lora_magnitude_vector"))


def only_other_layers(there: Path) -> None:
    def change(tensors):
        for name in [n for n in tensors if "layers.0." in n or "layers.4." in n]:
            del tensors[name]

    edit_tensors(there / "adapter" / WEIGHTS, change)


nan = torch.full((4, 64), float("nan"))
SPOILT = {
    "other geometry": (other_geometry, r"down_proj is \(64, 112\) in the model and \(32, 112\) in the adapter"),
    "more layers": (more_layers, "has tensors for model.layers.5, but the model has 5 layers"),
    "base pruned otherwise": (other_pruning, "drops other layers than this model"),
    "no lora_B": (without(f"{FIRST}.lora_B.weight"), "layers.0.self_attn.q_proj has no lora_B"),
    "no lora_A": (without(f"{FIRST}.lora_A.weight"), "layers.0.self_attn.q_proj has no lora_A"),
    "no magnitude": (dora_without_magnitude, "layers.0.self_attn.q_proj has no lora_magnitude_vector"),
    "magnitude without DoRA": (with_tensor(f"{FIRST}.lora_magnitude_vector", torch.ones(96)), "but use_dora is off"),
    "NaN": (with_tensor(f"{FIRST}.lora_A.weight", nan), "q_proj.lora_A.weight holds NaN or infinity"),
    "infinity": (with_tensor(f"{FIRST}.lora_A.weight", nan.nan_to_num(float("inf"))), "holds NaN or infinity"),
    "other rank": (set_config(r=8), "has rank 4, but the configuration says 8"),
    "halves do not fit": (with_tensor(f"{FIRST}.lora_A.weight", torch.ones(3, 64)), "do not fit each other"),
    "rank is no number": (set_config(r="4"), "r of .* is '4', not a number"),
    "alpha is missing": (set_config(lora_alpha=None), "lora_alpha of .* is None, not a number"),
    "pattern is no expression": (set_config(rank_pattern={"(": 2}), "rank_pattern that cannot be used"),
    "target is no expression": (set_config(target_modules="("), "neither names nor a regular expression"),
    "no targets": (set_config(target_modules=[]), "neither names nor a regular expression"),
    "integer factors": (with_tensor(f"{FIRST}.lora_A.weight", torch.ones(4, 64, dtype=torch.int8)), "dtype I8"),
    "missing module": (without(f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"), "holds no tensors for it"),
    "untargeted module": (set_config(target_modules=["k_proj"]), "which its configuration does not target"),
    "missing head": (set_config(target_modules=[*PROJECTIONS, "lm_head"]), "targets lm_head, but holds no tensors"),
    "strange tensor": (with_tensor("base_model.model.lm_head.base_layer.weight", torch.ones(2)), "belongs to no LoRA"),
    "embedding": (with_tensor("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 96)), "embed_tok"),
    "unknown module": (
        set_tensors(lambda t: t.update({f"base_model.model.score.lora_{x}.weight": torch.ones(4, 4) for x in "AB"})),
        "has an update for score, which is neither a decoder layer nor the head",
    ),
    "nothing matches": (only_other_layers, "matches nothing"),
    "lora_bias": (set_config(lora_bias=True), "sets lora_bias"),
    "bias": (set_config(bias="all"), "trains biases"),
    "modules_to_save": (set_config(modules_to_save=["lm_head"]), "sets modules_to_save"),
    "trainable tokens": (set_config(trainable_token_indices=[1, 2]), "sets trainable_token_indices"),
    "target_parameters": (set_config(target_parameters=["mlp.experts"]), "sets target_parameters"),
    "other kind": (set_config(peft_type="LOHA"), "is of type LOHA"),
    "PiSSA": (set_config(init_lora_weights="pissa_niter_4"), "initialised by pissa_niter_4"),
    "OLoRA": (set_config(init_lora_weights="olora"), "initialised by olora"),
    "pickle": (pickled, "pickled, which can run code"),
    "no adapter weights": (remove(f"adapter/{WEIGHTS}"), f"there is no {WEIGHTS}"),
    "no adapter config": (remove("adapter/adapter_config.json"), "there is no adapter_config.json"),
    "no adapter": (remove("adapter"), "there is no adapter_config.json"),
    "adapter config is no JSON": (broken_json("adapter/adapter_config.json"), "cannot be read as JSON"),
    "truncated adapter": (truncated(f"adapter/{WEIGHTS}", 0.9), "where its header promises"),
    "truncated base": (truncated("A/model.safetensors", 0.5), "where its header promises"),
    "header cut": (truncated("A/model.safetensors", 0.001), "cut short"),
    "header beyond the file": (long_header, "claims a header of 1099511627776 bytes"),
    "missing shard": (missing_shard, "which is missing"),
    "shard outside": (shard_outside, "which is not a file beside it"),
    "tensor not in its shard": (unindexed_tensor, "lacks model.more.weight"),
    "no final norm": (in_base(lambda t: t.pop("model.norm.weight")), "has no tensor model.norm.weight"),
    "no embedding": (in_base(lambda t: t.pop("model.embed_tokens.weight")), "has no tensor model.embed_tokens.weight"),
    "no head": (in_base(lambda t: t.pop("lm_head.weight")), "has no tensor lm_head.weight"),
    "no layernorm": (
        in_base(lambda t: t.pop("model.layers.4.post_attention_layernorm.weight")),
        "has no tensor model.layers.4.post_attention_layernorm.weight",
    ),
    "norm of another shape": (
        in_base(lambda t: t.update({"model.norm.weight": torch.ones(32)})),
        r"model.norm.weight has the shape \(32,\), and by config.json it is \(64,\)",
    ),
    "quantised": (quantised, "stored as I8: quantised weights are not merged here"),
    "no base": (remove("A"), "there is no such directory"),
    "no base weights": (remove("A/model.safetensors"), "there is no model.safetensors"),
    "no manifest": (remove("A/manifest.json"), r"no weights of layers \[1, 2, 3\], and no manifest.json"),
    "no tokenizer": (remove("A/tokenizer.json"), "no tokenizer found"),
    "base config is no JSON": (broken_json("A/config.json"), "cannot be read as JSON"),
}
