"""Exported stages in stock transformers: nothing missing, nothing left over, the same numbers as the stage itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cut_model import cut, make_compact, random_windows, save_dense
from safetensors.torch import load_file, save_file
from tiny import save_adapter, save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.exporting.export import export_stage
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.streaming.compute import Compute

LAYOUT, SCATTERED, FIRST_AND_LAST = Layout(8, (3, 4), (5, 6)), Layout(8, (1, 6), (3,)), Layout(8, (0,), (7,))
FLOAT32 = Compute(torch.device("cpu"), torch.float32)
SMALL = {"config.json", "export.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def parts(folder: Path, layout: Layout = LAYOUT, **config) -> tuple[Path, dict[str, Path]]:
    """A, with a tokenizer, and the bundles of a random model."""
    a, bundles = cut(save_dense(folder / "dense", **config), layout, folder)
    save_tokenizer(a)
    return a, bundles


@torch.inference_mode()
def stock(folder: Path, windows) -> tuple[AutoModelForCausalLM, np.ndarray]:
    """A directory in stock transformers, which must find exactly what it expects, and the NLL of each window."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    ids = windows.ids.long()
    logits = model(ids).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return model, loss.double().sum(1).numpy()


def score(folder: Path, bundles: dict[str, Path], stage: str, windows, work: Path) -> np.ndarray:
    """The NLL of each window by our own engine."""
    (result,) = evaluate_stages(Subject.open(folder, bundles), [stage], windows, FLOAT32, work_dir=work)
    return result.scores.nll


def written(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model directory, by the index if it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in weight_map.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("layout", "config", "shard"),
    [
        (LAYOUT, {}, None),
        (LAYOUT, {"tie_word_embeddings": True}, 60_000),
        (SCATTERED, {"sliding_window": 12}, 60_000),
        (FIRST_AND_LAST, {"tie_word_embeddings": True, "num_key_value_heads": 1}, None),
    ],
)
def test_a_stage_in_stock_transformers(tmp_path, stage, layout, config, shard):
    a, bundles = parts(tmp_path, layout, **config)
    out = tmp_path / "out"
    report = export_stage(a, out, stage=stage, bundles=bundles, max_shard_size=shard)
    assert report.layers == layout.active(stage)
    windows = random_windows(3, 32)
    model, nll = stock(out, windows)
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config.num_hidden_layers == len(model.model.layers) == len(layout.active(stage))
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == bool(
        config.get("tie_word_embeddings")
    )
    ours = score(a, bundles, stage, windows, tmp_path / "stage")
    np.testing.assert_allclose(nll, ours, rtol=1e-6)
    # Our own tools take it for a dense model, with the same numbers to the bit.
    np.testing.assert_array_equal(score(out, {}, "FULL", windows, tmp_path / "dense"), ours)

    prompt = windows.ids[:1, :8].long()
    with torch.inference_mode():
        cached, uncached = (
            model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=use)
            for use in (True, False)
        )
    assert torch.equal(cached, uncached) and cached.shape == (1, 20)

    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert {p.name for p in out.iterdir()} == SMALL | set(shards) | (
        {"model.safetensors.index.json"} if len(shards) > 1 else set()
    )
    assert (len(shards) > 1) == (shard is not None)


def test_shards_and_their_index_hold_every_tensor_once(tmp_path):
    a, bundles = parts(tmp_path)
    export_stage(a, tmp_path / "one", stage="AB", bundles=bundles)
    export_stage(a, tmp_path / "many", stage="AB", bundles=bundles, max_shard_size=60_000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = {p.name: load_file(p) for p in (tmp_path / "many").glob("*.safetensors")}
    assert sorted(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert {name: file for file, held in shards.items() for name in held} == index["weight_map"]
    assert sum(map(len, shards.values())) == len(index["weight_map"])
    tensors = [tensor for held in shards.values() for tensor in held.values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    for held in shards.values():
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 60_000
    one = written(tmp_path / "one")
    assert one.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensor, one[name]) for name, tensor in written(tmp_path / "many").items())


def test_a_single_file_is_what_the_safetensors_library_would_write(tmp_path):
    a, _ = parts(tmp_path)
    export_stage(a, tmp_path / "out", stage="A")
    save_file(load_file(tmp_path / "out/model.safetensors"), tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again").read_bytes()


def test_the_record_maps_indices_and_names_everything_that_went_in_and_came_out(tmp_path):
    a, bundles = parts(tmp_path, SCATTERED)
    out = tmp_path / "out"
    report = export_stage(a, out, stage="AB", bundles=bundles)
    record = json.loads((out / "export.json").read_text())
    assert record["original_index"] == {"0": 0, "1": 1, "2": 2, "3": 4, "4": 5, "5": 6, "6": 7}
    assert record["parts"] == {"A": [0, 2, 4, 5, 7], "B": [1, 6]}
    assert (record["stage"], record["format"], record["dense_layers"]) == ("AB", "stock", 8)
    # Index by index, the weights are those of the dense model.
    dense, tensors = load_file(tmp_path / "dense/model.safetensors"), written(out)
    for new, original in record["original_index"].items():
        name = "self_attn.q_proj.weight"
        assert torch.equal(tensors[f"model.layers.{new}.{name}"], dense[f"model.layers.{original}.{name}"])
    assert record["outputs"] == {p.name: sha256(p) for p in out.iterdir() if p.name != "export.json"}
    used = [a / name for name in ("config.json", "manifest.json", "model.safetensors", "generation_config.json")]
    used += [a / "tokenizer.json", a / "tokenizer_config.json"]
    used += [bundles["B"] / name for name in ("layer_001.safetensors", "layer_006.safetensors", "bundle_meta.json")]
    assert record["inputs"] == {str(file): sha256(file) for file in used}
    assert record["remarks"] == ["the bundle C is no part of stage AB and is left out"] == list(report.remarks)
    assert record["versions"].keys() == {"mistral-prune-lora", "torch", "transformers"}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_dense_model_is_exported_as_full(tmp_path):
    dense = save_dense(tmp_path / "dense")
    save_tokenizer(dense)
    export_stage(dense, tmp_path / "out", stage="FULL", max_shard_size=60_000)
    windows = random_windows(2, 16)
    np.testing.assert_array_equal(stock(tmp_path / "out", windows)[1], stock(dense, windows)[1])


def test_a_compact_a_is_the_same_stage(tmp_path):
    a, bundles = parts(tmp_path)
    export_stage(a, tmp_path / "before", stage="AB", bundles=bundles)
    make_compact(a, LAYOUT)
    export_stage(a, tmp_path / "after", stage="AB", bundles=bundles)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500.0, "original_max_position_embeddings": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("config", "settings"),
    [(LlamaConfig, {"rope_parameters": LLAMA3}), (Qwen2Config, SLIDING), (Qwen3Config, {**SLIDING, "head_dim": 12})],
)
def test_other_families_and_several_shards_going_in(tmp_path, config, settings):
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    dense = AutoModelForCausalLM.from_config(config(**shape, **heads, initializer_range=0.2, **settings))
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    save_tokenizer(tmp_path / "dense")
    prune_model(tmp_path / "dense", Layout(5, (1,), (3,)), save_dir=tmp_path / "A", save_removed_dir=tmp_path)
    bundles = {part: tmp_path / part for part in "BC"}
    windows = random_windows(2, 48)
    for stage in STAGES:
        export_stage(tmp_path / "A", tmp_path / "out", stage=stage, bundles=bundles)
        model, nll = stock(tmp_path / "out", windows)
        assert type(model) is type(dense)
        np.testing.assert_allclose(nll, score(tmp_path / "A", bundles, stage, windows, tmp_path / "w"), rtol=1e-6)
    np.testing.assert_array_equal(nll, stock(tmp_path / "dense", windows)[1])  # FULL


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings(tmp_path, same):
    """The same matrix once more is left out; another one is what transformers would use, so it is written as untied."""
    a, bundles = parts(tmp_path, tie_word_embeddings=True)
    tensors = load_file(a / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() if same else torch.randn(96, 64).bfloat16()
    save_file(tensors, a / "model.safetensors", metadata={"format": "pt"})
    report = export_stage(a, tmp_path / "out", stage="A", bundles=bundles)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is same
    assert ("lm_head.weight" in written(tmp_path / "out")) is not same
    assert any("lm_head.weight is" in remark or "called untied" in remark for remark in report.remarks)
    windows = random_windows(2, 16)
    _, nll = stock(tmp_path / "out", windows)
    np.testing.assert_allclose(nll, score(a, bundles, "A", windows, tmp_path / "w"), rtol=1e-6)


def test_configuration_and_settings_are_those_of_a_model_to_use(tmp_path):
    """What training and pruning left in them is set right; every tokenizer file comes along."""
    a, bundles = parts(tmp_path)
    config = json.loads((a / "config.json").read_text())
    changed = {"use_cache": False, "architectures": ["PrunedForCausalLM"], "dtype": "float16"}
    (a / "config.json").write_text(json.dumps({**config, **changed}))
    generation = {"eos_token_id": [2, 7], "use_cache": False, "temperature": 0.5, "do_sample": True}
    (a / "generation_config.json").write_text(json.dumps(generation))
    extras = ["tokenizer.model", "tokenizer.model.v3", "tekken.json", "special_tokens_map.json", "chat_template.jinja"]
    for name in [*extras, "additional_chat_templates/rag.jinja"]:
        (a / name).parent.mkdir(exist_ok=True)
        (a / name).write_text(f"content of {name}")
    (a / "consolidated.safetensors").write_bytes(b"")
    for _ in range(2):  # a former export is replaced
        export_stage(a, tmp_path / "out", stage="A", bundles=bundles)
    out = json.loads((tmp_path / "out/config.json").read_text())
    assert out["use_cache"] is True and out["architectures"] == ["MistralForCausalLM"]
    assert out["dtype"] == out["torch_dtype"] == "bfloat16"  # as the weights are
    assert out["rope_theta"] == out["rope_parameters"]["rope_theta"]  # older software reads the first only
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings == {**generation, "use_cache": True}
    for name in [*extras, "additional_chat_templates/rag.jinja"]:
        assert (tmp_path / "out" / name).read_text() == f"content of {name}"
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not {"manifest.json", "prune_log.json", "layers_map.json"} & {p.name for p in (tmp_path / "out").iterdir()}


def test_settings_are_taken_from_original_config_where_they_lie_there_only(tmp_path):
    a, _ = parts(tmp_path)
    (a / "original_config").mkdir()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (a / name).rename(a / "original_config" / name)
    export_stage(a, tmp_path / "out", stage="A")
    assert {p.name for p in (tmp_path / "out").iterdir()} == SMALL | {"model.safetensors"}


def test_no_adapter_is_merged_onto_layers_that_were_renumbered(tmp_path):
    """B's layers 3 and 4 are no layers of stage A, which has others under these numbers."""
    a, bundles = parts(tmp_path, vocab_size=259)
    for stage in STAGES:
        export_stage(a, tmp_path / f"exported_{stage}", stage=stage, bundles=bundles)
    save_adapter(tmp_path / "B_lora", tmp_path / "dense", [3, 4], 0)
    with pytest.raises(CheckpointError, match=r"exported stage whose layers have other numbers .*A\)"):
        merge_adapters(tmp_path / "exported_A", [tmp_path / "B_lora"], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    merge_adapters(tmp_path / "exported_FULL", [tmp_path / "B_lora"], tmp_path / "out", device="cpu")
