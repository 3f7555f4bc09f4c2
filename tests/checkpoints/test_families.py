"""Every family that is taken, through every part of the pipeline, against transformers and PEFT."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from cut_model import cut, make_compact, plain_stage, random_windows, save_dense
from merge_oracle import LORA_OF_ALL, peft_merged, random_adapter, read_result, zero_outside
from safetensors.torch import load_file
from tiny import save_tokenizer
from training_jobs import train_job
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.distillation.settings import LoraSettings, OptimiserSettings
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.evaluation.adapters import open_peft_adapters
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.pruning.identity import PassLayer
from mistral_prune_lora.streaming.compute import Compute

# The first layer of each kind of attention is dropped: a KV cache measures its length there.
LAYOUT = Layout(6, (0, 3), (4,))
WINDOW = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 3}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTARY = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0 + i / 8 for i in range(12)], "long_factor": [2.0 + i for i in range(12)],
    },
}  # fmt: skip
FAMILIES = {
    "mistral": {"family": "mistral", "sliding_window": 12},
    "llama": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": {"family": "llama", "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2 window": {"family": "qwen2", **WINDOW},
    "qwen3": {"family": "qwen3"},
    "qwen3 kinds": {
        "family": "qwen3", **WINDOW, "attention_bias": True, "tie_word_embeddings": True,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "sliding", "full", "sliding", "full")],
    },
}  # fmt: skip
# Mistral goes through all of this in tests of its own.
OTHERS = pytest.mark.parametrize("kind", ["llama", "qwen2 window", "qwen3 kinds"])


def dense_and_parts(folder, config, dtype=torch.bfloat16):
    dense = save_dense(folder / "dense", dtype=dtype, num_hidden_layers=6, **config)
    save_tokenizer(dense)
    return dense, *cut(dense, LAYOUT, folder, dtype)


@pytest.mark.parametrize("kind", [*FAMILIES, *ROTARY])
def test_stages_equal_plain_transformers(tmp_path, kind):
    # Windows of 32 ids are longer than what the rotary embeddings that look at the length were made for.
    short = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    config = FAMILIES.get(kind) or {"family": "llama", "rope_parameters": ROTARY[kind], **short}
    dense, a, bundles = dense_and_parts(tmp_path, config)
    windows, subject = random_windows(5, 32), Subject.open(a, bundles)
    for dtype, batch_size in ((torch.float32, 2), (torch.bfloat16, 1)):
        compute, final = Compute(torch.device("cpu"), dtype, batch_size), tmp_path / "final.safetensors"
        for stage in STAGES:
            work = tmp_path / f"{stage}-{dtype}"
            (result,) = evaluate_stages(subject, [stage], windows, compute, work_dir=work, final_hidden=final)
            hidden, nll = plain_stage(dense, LAYOUT.active(stage), windows, dtype, batch_size)
            assert torch.equal(load_file(final)["hidden_states"], hidden)
            np.testing.assert_allclose(result.scores.nll, nll.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("llama", {"attention_bias": False}),
        ("llama3", {"rope_parameters": None}),
        ("qwen2 window", {"use_sliding_window": False}),
        ("qwen3 kinds", {"layer_types": None}),
        *((kind, {"rope_parameters": None}) for kind in ROTARY),
    ],
)
def test_what_families_differ_in_matters_to_the_plain_model(tmp_path, kind, without):
    """The test above would prove nothing if what it varies changed nothing."""
    short = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    config = FAMILIES.get(kind) or {"family": "llama", "rope_parameters": ROTARY[kind], **short}
    windows, everything = random_windows(2, 32), tuple(range(6))
    one, other = (
        save_dense(tmp_path / str(i), num_hidden_layers=6, **config | changes)
        for i, changes in enumerate(({}, without))
    )
    first, second = (plain_stage(dense, everything, windows, torch.float32, 1)[0] for dense in (one, other))
    assert not torch.allclose(first, second, rtol=1e-3)


@OTHERS
def test_merges_have_the_bits_of_peft(tmp_path, kind):
    dense, a, bundles = dense_and_parts(tmp_path, FAMILIES[kind])
    parts = {"A": a, **bundles}
    adapters = [
        random_adapter(tmp_path / f"adapter{seed}", dense, {**LORA_OF_ALL, "use_dora": bool(seed)}, seed=seed)
        for seed in (0, 1)
    ]
    expected = peft_merged(dense, adapters, torch.bfloat16)
    for part in "ABC":
        given = adapters
        if part == "A":
            given = [zero_outside(a, LAYOUT.kept, tmp_path / f"for-A-{i}") for i, a in enumerate(adapters)]
        merge_adapters(parts[part], given, tmp_path / f"{part}_merged")
        got, before = read_result(tmp_path / f"{part}_merged"), read_result(parts[part])
        assert got.keys() == before.keys()
        for name, tensor in got.items():
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
            changed = not torch.equal(tensor, before[name])
            assert changed == (name.endswith("_proj.weight")), name


@OTHERS
def test_an_adapter_beside_the_weights_is_that_of_peft(tmp_path, kind):
    dense, a, bundles = dense_and_parts(tmp_path, FAMILIES[kind], torch.float32)
    adapter = random_adapter(tmp_path / "A_lora", dense, {**LORA_OF_ALL, "layers_to_transform": list(LAYOUT.kept)})
    windows, compute = random_windows(2, 24), Compute(torch.device("cpu"), torch.float32, 2)
    subject = Subject(open_checkpoint(a), adapters=open_peft_adapters([adapter], LAYOUT, [a]))
    final = tmp_path / "final.safetensors"
    list(evaluate_stages(subject, ["A"], windows, compute, work_dir=tmp_path / "work", final_hidden=final))
    merge_adapters(a, [adapter], tmp_path / "merged")
    merged = Subject.open(tmp_path / "merged", bundles)
    (found,) = evaluate_stages(
        merged, ["A"], windows, compute, work_dir=tmp_path / "work", final_hidden=tmp_path / "merged.safetensors"
    )
    beside, within = (load_file(file)["hidden_states"] for file in (final, tmp_path / "merged.safetensors"))
    torch.testing.assert_close(beside, within, rtol=1e-3, atol=1e-4)
    assert found.record["active_layers"] == len(LAYOUT.kept)


@OTHERS
def test_pruned_and_restored_it_is_the_dense_model_and_generates_as_it(tmp_path, kind):
    dense = save_dense(tmp_path / "dense", num_hidden_layers=6, **FAMILIES[kind])
    save_tokenizer(dense)
    prune_model(dense, LAYOUT, save_dir=tmp_path / "A", save_removed_dir=tmp_path / "bundles")
    bundles = {part: tmp_path / "bundles" / part for part in "BC"}
    manager = DynamicStageManager(tmp_path / "A", bundles, dtype=torch.float32)
    ids = random_windows(2, 20).ids.long()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for stage in STAGES:
        manager.set_stage(stage)
        plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
        for i in set(range(6)) - set(LAYOUT.active(stage)):
            plain.model.layers[i] = PassLayer(i)
        with torch.inference_mode():
            assert torch.equal(manager.model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0  # padded, so that the mask matters at every step
        cached, without = (
            manager.model.generate(ids, attention_mask=mask, use_cache=cache, **settings) for cache in (True, False)
        )
        assert torch.equal(cached, without)
        assert torch.equal(without, plain.generate(ids, attention_mask=mask, use_cache=False, **settings))


def compact(a, **changes):
    """Rewrite A as one that counts its kept layers only, and lists their kinds of attention only."""
    make_compact(a, LAYOUT)
    config = json.loads((a / "config.json").read_text())
    config["layer_types"] = [config["layer_types"][i] for i in LAYOUT.kept]
    (a / "config.json").write_text(json.dumps(config | changes))


def test_a_compact_a_whose_layers_are_of_one_kind_is_the_same_model(tmp_path):
    _, a, bundles = dense_and_parts(tmp_path, FAMILIES["qwen2"])
    windows, compute = random_windows(2, 16), Compute(torch.device("cpu"), torch.float32, 2)
    before = [
        r.record for r in evaluate_stages(Subject.open(a, bundles), STAGES, windows, compute, work_dir=tmp_path / "w")
    ]
    compact(a)
    after = [
        r.record for r in evaluate_stages(Subject.open(a, bundles), STAGES, windows, compute, work_dir=tmp_path / "v")
    ]
    assert [r["mean_nll"] for r in after] == [r["mean_nll"] for r in before]


@pytest.mark.parametrize(("kind", "changes"), [("qwen3 kinds", {}), ("qwen2 window", {"layer_types": None})])
def test_a_compact_a_that_does_not_say_what_its_dropped_layers_are_is_refused(tmp_path, kind, changes):
    _, a, _ = dense_and_parts(tmp_path, FAMILIES[kind])
    compact(a, **changes)
    with pytest.raises(CheckpointError, match="that of the dropped ones is not known"):
        open_checkpoint(a)


@OTHERS
def test_an_adapter_is_trained(tmp_path, kind):
    dense, a, bundles = dense_and_parts(tmp_path, FAMILIES[kind])
    train_job(
        "B",
        student_dir=a,
        teacher_dir=dense,
        windows=random_windows(4, 16),
        output_dir=tmp_path / "adapter",
        bundles=[bundles["B"]],
        lora=LoraSettings(rank=2),
        optimiser=OptimiserSettings(steps=8, batch_size=2, gradient_accumulation=1, learning_rate=1e-2, warmup_steps=1),
        dtype=torch.float32,
    )
    loss = pd.read_csv(tmp_path / "adapter/training.csv").loss
    assert loss.iloc[-1] < loss.iloc[0]
    names = {
        name.split(".layers.")[1].rsplit(".", 2)[0]
        for name in load_file(tmp_path / "adapter/adapter_model.safetensors")
    }
    projections = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert names == {f"{i}.{p}" for i in LAYOUT.b for p in projections}
    merge_adapters(bundles["B"], [tmp_path / "adapter"], tmp_path / "B_merged")
    assert load_model(a, dtype=torch.bfloat16, bundles=(tmp_path / "B_merged",)).config.num_hidden_layers == 6
