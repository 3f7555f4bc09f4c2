"""Layers that come and go in the model's own decoder, against the whole model in transformers."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from cut_model import random_windows, save_dense
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.models.pass_layer import PassLayer
from mistral_prune_lora.streaming import backbone as backbone_module
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.memory import resident_groups, working_bytes
from mistral_prune_lora.streaming.record import RunRecord

CPU = torch.device("cpu")


@pytest.fixture(params=["mistral", "qwen3"])
def dense(tmp_path, request):
    return save_dense(tmp_path / "dense", family=request.param)


def sources(dense, layers):
    checkpoint = open_checkpoint(dense)
    return model_config(checkpoint), [LayerSource(index, checkpoint) for index in layers]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_in_groups_have_the_bits_of_the_whole_model(dense, dtype):
    config, layers = sources(dense, range(8))
    ids = random_windows(2, 12).ids.long()
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    expected = model.model(ids, output_hidden_states=True).hidden_states
    backbone, hidden, seen = Backbone(config, Compute(CPU, dtype, 2)), expected[0], {}
    for _ in backbone.resident([layers[:3], layers[3:4], layers[4:]]):
        hidden = backbone(hidden, lambda index, leaving: seen.update({index: leaving}))
    assert list(seen) == list(range(8))
    for index in range(7):
        assert torch.equal(seen[index], expected[index + 1])
    assert torch.equal(model.model.norm(hidden), expected[8])


def test_no_other_layer_stays_than_those_of_the_group(dense):
    config, layers = sources(dense, (1, 2, 6))
    backbone = Backbone(config, Compute(CPU, torch.float32))
    for group in backbone.resident([layers[:2], layers[2:]]):
        held = [i for i, layer in enumerate(backbone._model.layers) if not isinstance(layer, PassLayer)]
        assert held == [source.index for source in group]


def test_groups_take_as_many_layers_as_fit_in_order(dense):
    config, layers = sources(dense, range(8))
    layer, beside = layers[0].nbytes(torch.float32), working_bytes(Compute(CPU, torch.float32), config, 12)
    for fit, groups in ((8, [8]), (3, [3, 3, 2]), (1, [1] * 8)):
        compute = Compute(CPU, torch.float32, max_memory=beside + 1000 + fit * layer)
        found = resident_groups(layers, compute, config, 12, reserved=1000)
        assert [len(group) for group in found] == groups
        assert [source.index for group in found for source in group] == list(range(8))
    with pytest.raises(PipelineError, match="do not fit into"):
        resident_groups(layers, Compute(CPU, torch.float32, max_memory=beside + layer - 1), config, 12)
    assert resident_groups([], Compute(CPU, torch.float32), config, 12) == []


def test_on_a_gpu_two_groups_at_once_are_counted_unless_nothing_overlaps(dense):
    config, layers = sources(dense, range(8))
    gpu = Compute(torch.device("cuda"), torch.float32)
    layer, beside = layers[0].nbytes(torch.float32), working_bytes(gpu, config, 12)
    for fit, overlapping, alone in ((8, [8], [8]), (7, [3, 3, 2], [7, 1]), (2, [1] * 8, [2] * 4)):
        compute = replace(gpu, max_memory=beside + fit * layer)
        for overlap, wanted, at_once in ((True, overlapping, 2), (False, alone, 1)):
            found = [len(group) for group in resident_groups(layers, replace(compute, overlap=overlap), config, 12)]
            assert found == wanted
            held = max(sum(found[i : i + at_once]) for i in range(len(found)))
            assert beside + held * layer <= compute.max_memory
    with pytest.raises(PipelineError, match="do not fit into"):
        resident_groups(layers, replace(gpu, max_memory=beside + 2 * layer - 1), config, 12)


@pytest.fixture
def streams_that_do_nothing(monkeypatch):
    """Lets the CPU go the way of a GPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Compute, "copies_meanwhile", True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


@pytest.mark.usefixtures("streams_that_do_nothing")
@torch.inference_mode()
def test_the_next_group_is_loaded_meanwhile_and_no_third_one_is_there(dense, monkeypatch):
    alive, most = WeakSet(), []

    def build(*given):
        layer = build_layer(*given)
        alive.add(layer)
        most.append(len(alive))
        return layer

    build_layer = backbone_module.build_layer
    monkeypatch.setattr(backbone_module, "build_layer", build)
    config, layers = sources(dense, range(8))
    ids = random_windows(2, 12).ids.long()
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    expected = model.model(ids, output_hidden_states=True).hidden_states
    backbone, hidden = Backbone(config, Compute(CPU, torch.float32, 2)), expected[0]
    for _ in backbone.resident([layers[:2], layers[2:4], layers[4:6], layers[6:]]):
        hidden = backbone(hidden)
    assert torch.equal(model.model.norm(hidden), expected[8])
    assert most == [1, 2, 3, 4, 3, 4, 3, 4]


def test_scores_are_counted_where_a_gpu_s_attention_would_hold_them(dense):
    config, _ = sources(dense, ())
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    cuda = torch.device("cuda")

    def more(config, dtype, **told):
        on_gpu, on_cpu = (working_bytes(Compute(device, dtype, 3), config, 12, **told) for device in (cuda, CPU))
        return on_gpu - on_cpu

    assert more(config, torch.float32) == 4 * 4 * 3 * 4 * 12 * 12
    assert more(config, torch.bfloat16) == more(config, torch.float32, documents_apart=True) == 0
    for sliding, counted in ((12, True), (11, False)):
        config.sliding_window = sliding
        assert (more(config, torch.float32) > 0) is counted
    config.num_key_value_heads, config.sliding_window = 4, None
    assert more(config, torch.float32) == 0


def test_no_record_tells_whether_loading_overlapped(dense):
    _, layers = sources(dense, range(2))
    start = RunRecord.start(layers[0].checkpoint, random_windows(2, 12), torch.float32)
    records = [start.after(layers, Compute(CPU, torch.float32, overlap=overlap)).content() for overlap in (True, False)]
    assert records[0] == records[1]


def test_a_layer_s_size_is_that_of_its_parameters_in_the_compute_dtype(dense):
    _, (layer,) = sources(dense, [5])
    model = AutoModelForCausalLM.from_pretrained(dense)
    numbers = sum(parameter.numel() for parameter in model.model.layers[5].parameters())
    assert [layer.nbytes(dtype) for dtype in (torch.float32, torch.bfloat16)] == [4 * numbers, 2 * numbers]
