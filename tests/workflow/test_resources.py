"""What jobs ask for, held against the arithmetic of the rooms that use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from transformers import MistralForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.family_tensors import family_tensors
from mistral_prune_lora.device import granted
from mistral_prune_lora.distillation import loss
from mistral_prune_lora.distillation.adapted import with_adapter
from mistral_prune_lora.distillation.settings import LoraSettings
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.models.window_scores import head_bytes
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES
from mistral_prune_lora.storage.safetensors_file import TensorSpec, plan_file
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.memory import resident_groups
from mistral_prune_lora.streaming.passage import embedding_bytes
from mistral_prune_lora.workflow import resources
from mistral_prune_lora.workflow.geometry import Geometry
from mistral_prune_lora.workflow.resources import Pass, Training, scaled

MODELS = {
    "135M": dict(layers=30, hidden=576, intermediate=1536, heads=9, kv=3, vocabulary=49152, tied=True),
    "7B": dict(layers=32, hidden=4096, intermediate=14336, heads=32, kv=8, vocabulary=32000, tied=False),
    "70B": dict(layers=80, hidden=8192, intermediate=28672, heads=64, kv=8, vocabulary=32000, tied=False),
}  # fmt: skip
TRAINING = Training("bf16", 2048, 1, 8, 1000, 16, checkpointing=False, shared_teacher=True)


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request, tmp_path_factory) -> Path:
    """A model of which the header is there and no byte of the weights: the file is all holes."""
    folder, size = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": size["layers"],
        "hidden_size": size["hidden"],
        "intermediate_size": size["intermediate"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "vocab_size": size["vocabulary"],
        "tie_word_embeddings": size["tied"],
        "sliding_window": None,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = family_tensors(config, folder)
    shapes = tensors.outside | {
        f"model.layers.{layer}.{name}": shape
        for layer in range(size["layers"])
        for name, shape in tensors.layer.items()
    }
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    head, _ = plan_file(specs)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for spec in specs))
    return folder


@pytest.fixture(scope="module")
def model(model_dir) -> Checkpoint:
    return open_checkpoint(model_dir)


@pytest.fixture(scope="module")
def geometry(model_dir) -> Geometry:
    return Geometry.read(model_dir)


def groups(model: Checkpoint, run: Pass, needs, layers: int, beside: int | str) -> list[list[LayerSource]]:
    """How the streaming room divides layers with what the job is granted on a CPU; PipelineError if it cannot.

    Beside them are so many heads, or "states": of the last tokens, as `importance.last_token_states` keeps them.
    """
    dtype = COMPUTE_DTYPES[run.dtype]
    compute = Compute(torch.device("cpu"), dtype, run.batch_size, granted(1, 0, needs.mem_mb).memory_bytes)
    config, reserved = model_config(model), embedding_bytes(model, compute)
    if beside == "states":
        reserved += torch.empty(layers + 1, run.windows, config.hidden_size, device="meta").nbytes
    else:
        reserved += beside * head_bytes(model, dtype)
    sources = [LayerSource(layer, model) for layer in range(layers)]
    return resident_groups(sources, compute, config, run.seqlen, reserved)


def test_sizes_are_those_of_the_headers(model, geometry):
    assert geometry.weights_bytes() == sum(entry.nbytes for entry in model.entries.values())
    assert geometry.layer_bytes == sum(entry.nbytes for entry in model.layer(3).values())
    assert geometry.largest_tensor_bytes == max(entry.nbytes for entry in model.entries.values())
    assert geometry.weights_bytes(4) == geometry.weights_bytes() - (geometry.layers - 4) * geometry.layer_bytes


@pytest.mark.parametrize("gpu", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_streams_layers_runs_with_what_it_is_granted(model, geometry, dtype, batch_size, gpu):
    run = Pass(dtype, 2048, 256, batch_size, gpu)
    for needs, layers, heads in (
        (resources.segment(geometry, 4, run), 4, 0),
        (resources.segment(geometry, 1, run), 1, 0),
        (resources.perplexity(geometry, 12, run, compared=True), 12, 2),
        (resources.perplexity(geometry, 0, run, compared=True), 0, 2),
        (resources.dense_perplexity(geometry, run), geometry.layers, 1),
        (resources.teacher_states(geometry, run), geometry.layers, 0),
        (resources.importance(geometry, run), geometry.layers, "states"),
    ):
        divided = groups(model, run, needs, layers, heads)
        assert [source.index for group in divided for source in group] == list(range(layers))
        assert all(len(group) > 1 for group in divided[:-1]), (
            "one layer at a time would go by way of the disk too often"
        )
        assert needs.gpu == gpu


def test_a_small_model_goes_through_in_one_piece_and_no_model_asks_for_its_own_size(model, geometry):
    run = Pass("fp32", 512, 16, 1, gpu=0)
    needs = resources.dense_perplexity(geometry, run)
    whole = geometry.weights_bytes() * 2 / 10**6
    if whole < 3000:
        assert len(groups(model, run, needs, geometry.layers, 1)) == 1
    else:
        assert needs.mem_mb < whole / 2


def test_more_work_asks_for_more(geometry):
    run, more = Pass("bf16", 2048, 256, 1, gpu=0), Pass("bf16", 2048, 2560, 1, gpu=0)
    fewer, all_layers = (resources.segment(geometry, layers, run) for layers in (2, geometry.layers))
    assert fewer.mem_mb <= all_layers.mem_mb and fewer.runtime <= all_layers.runtime
    assert resources.segment(geometry, 2, more).runtime > fewer.runtime >= 10
    assert resources.segment(geometry, 2, Pass("bf16", 2048, 256, 1, gpu=1)).runtime < fewer.runtime
    alone, with_teacher = (
        resources.train_adapter(geometry, 20, 20, Training(**{**vars(TRAINING), "shared_teacher": shared}))
        for shared in (True, False)
    )
    assert with_teacher.mem_mb - alone.mem_mb > 0.7 * geometry.weights_bytes() / 10**6
    assert with_teacher.runtime > alone.runtime


def test_merge_and_export_stay_flat(geometry):
    few, many = resources.merge(geometry, 1), resources.merge(geometry, geometry.layers, ends=True)
    assert few.mem_mb == many.mem_mb == resources.export(geometry, geometry.layers).mem_mb
    assert 10 == few.runtime <= many.runtime
    assert many.runtime * 60 > 4 * geometry.weights_bytes() / 262e6  # what was measured, four times


def test_prune_holds_its_largest_tensor_and_a_conversion_the_model_in_float32(geometry):
    assert resources.prune(geometry).mem_mb * 10**6 > 2 * geometry.largest_tensor_bytes + 500_000_000
    converted = resources.fetch(geometry, converted=True).mem_mb
    assert converted * 10**6 > 2 * geometry.weights_bytes() * 2
    assert resources.fetch(geometry, converted=False).mem_mb < 4000


def test_a_model_that_is_not_there_is_assumed_to_be_at_least_as_large(geometry):
    assumed = Geometry.assumed(geometry.layers)
    assert assumed.layers == geometry.layers
    for part in ("layer_bytes", "ends_bytes", "largest_tensor_bytes"):
        assert getattr(assumed, part) >= getattr(geometry, part)
    run = Pass("fp32", 2048, 256)
    for job in (resources.dense_perplexity, resources.teacher_states, resources.importance):
        there, not_there = job(geometry, run), job(assumed, run)
        assert not_there.mem_mb >= there.mem_mb and not_there.runtime >= there.runtime


@pytest.mark.parametrize("layers", [1, 32, 33, 80, 81, 10_000])
def test_any_depth_has_an_assumed_width(layers):
    assert Geometry.assumed(layers).weights_bytes() > layers * 400_000_000


def saved_bytes(dtype: str, checkpointing: bool, lora: LoraSettings) -> tuple[int, Geometry, Training]:
    """What autograd keeps of a forward pass, weights left out; and what to reckon it from."""
    config = tiny_config(hidden_size=128, intermediate_size=352, num_attention_heads=4, head_dim=32)
    model = MistralForCausalLM(config).to(COMPUTE_DTYPES[dtype])
    adapted = with_adapter(model, range(8), lora)
    adapted.train()
    if checkpointing:
        adapted.activation_checkpointing_enable({"use_reentrant": False})
    own, kept = {p.untyped_storage().data_ptr() for p in adapted.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted.get_base_model().model(torch.randint(96, (2, 128)), use_cache=False)
    training = Training(dtype, 128, 2, 1, 1, lora.rank, checkpointing, shared_teacher=True)
    return sum(kept.values()), Geometry(8, 128, 352, 128, 64, 96), training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_that_a_backward_pass_asks_for_are_not_underestimated(dtype, checkpointing):
    found, geometry, training = saved_bytes(dtype, checkpointing, LoraSettings(rank=4))
    estimate = resources.activation_bytes(geometry, 8, training)
    # With checkpointing, a layer's own come in the backward pass, where none is kept here.
    assert found <= estimate <= (8 if checkpointing else 1.6) * found


def test_checkpointing_keeps_what_enters_each_layer():
    geometry = Geometry(32, 4096, 14336, 4096, 1024, 32000)
    without, with_it = (
        resources.train_adapter(geometry, 24, 24, Training(**{**vars(TRAINING), "checkpointing": checkpointing}))
        for checkpointing in (False, True)
    )
    assert with_it.mem_mb < 0.6 * without.mem_mb and with_it.runtime >= without.runtime
    entering = 24 * 2048 * 4096 * 2
    assert resources.activation_bytes(geometry, 24, Training(**{**vars(TRAINING), "checkpointing": True})) > entering


def test_training_holds_weights_optimiser_and_a_block_of_the_loss(geometry):
    needs = resources.train_adapter(geometry, geometry.layers, geometry.layers, TRAINING)
    config = LoraSettings(rank=TRAINING.rank)
    model = MistralForCausalLM(tiny_config())
    trained = sum(p.numel() for p in with_adapter(model, range(8), config).parameters() if p.requires_grad)
    tiny = Geometry(8, 64, 112, 96, 48, 96)
    assert trained <= 8 * resources._lora_parameters(tiny, TRAINING.rank) <= 1.5 * trained
    optimiser = 4 * 4 * geometry.layers * resources._lora_parameters(geometry, TRAINING.rank)
    assert loss._BLOCK["cpu"] == resources._LOSS_LOGITS
    blocks = 3 * 4 * loss._BLOCK["cpu"]
    assert needs.mem_mb * 10**6 > geometry.weights_bytes() + optimiser + blocks


def test_a_later_attempt_gets_more():
    assert [scaled(2000, attempt) for attempt in (1, 2, 3)] == [2000, 4000, 6000]


def test_a_model_without_a_dtype_counts_as_float32(tmp_path):
    config = tiny_config().to_dict() | {"dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Geometry.read(tmp_path).itemsize == 4
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    assert Geometry.read(tmp_path).itemsize == 2


def test_a_configuration_with_a_size_that_is_none_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict() | {"vocab_size": 0}))
    with pytest.raises(CheckpointError, match="vocab_size is 0, not a size"):
        Geometry.read(tmp_path)


def test_to_ask_takes_no_torch():
    script = "import sys, mistral_prune_lora.workflow.resources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
