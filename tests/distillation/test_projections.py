"""Written-out gradients of adapted projections against PEFT's own layers and autograd."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd import gradcheck
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from mistral_prune_lora.distillation.projections import _GatedProjection, _Projection, write_out_gradients

GEOMETRY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 50,
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def models(dtype=torch.float64, config=MistralConfig, modules=ALL, kind=MistralForCausalLM, **changes):
    """A model with an adapter that does something as PEFT has it, its twin whose gradients are written out, and how
    many projections of it those are."""
    torch.manual_seed(0)
    extra = changes.pop("model", {})
    plain = kind(config(**GEOMETRY, **extra)).to(dtype)
    lora = {"r": 4, "lora_alpha": 6, "target_modules": list(modules), "layers_to_transform": [1, 2]} | changes
    plain = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **lora))
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.promote_types(dtype, torch.float32)) / 4
    ours = copy.deepcopy(plain)
    return plain.train(), ours.train(), write_out_gradients(ours.get_base_model())


def step(model, seed=0):
    """What leaves the last layer, and the gradients of the adapter."""
    torch.manual_seed(seed)
    ids = torch.arange(12).view(2, 6)
    hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.float().square().sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


CASES = {
    "all": ({}, 14),
    "attention": ({"modules": ("q_proj", "o_proj")}, 4),
    "mlp": ({"modules": ("up_proj", "down_proj")}, 4),
    "rslora": ({"use_rslora": True}, 14),
    "ranks": ({"rank_pattern": {"down_proj": 7}, "alpha_pattern": {"q_proj": 3}}, 14),
    "biased": ({"config": LlamaConfig, "kind": LlamaForCausalLM, "model": {"attention_bias": True}}, 14),
}


@pytest.mark.parametrize("case", CASES)
def test_has_the_numbers_of_peft(case):
    changes, count = CASES[case]
    plain, ours, replaced = models(**changes)
    assert replaced == count
    (expected, gradients), (found, own) = step(plain), step(ours)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(own) == 2 * count
    assert all(gradient.abs().max() > 0 for gradient in own.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-10, atol=1e-10)


def test_16_bit_weights_have_an_adapter_in_float32():
    plain, ours, _ = models(torch.bfloat16)
    (expected, gradients), (found, own) = step(plain), step(ours)
    assert found.dtype == torch.bfloat16
    # Sums of 16-bit numbers in another order: a few roundings of 2^-8.
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
    for name, gradient in gradients.items():
        assert own[name].dtype == torch.float32
        assert (own[name] - gradient).norm() <= 0.03 * gradient.norm()


def test_dora_stays_as_peft_has_it():
    plain, ours, replaced = models(use_dora=True)
    assert replaced == 0
    assert torch.equal(step(plain)[0], step(ours)[0])


def test_another_activation_keeps_the_mlp_as_it_is():
    plain, ours, _ = models(model={"hidden_act": "gelu"})
    (expected, gradients), (found, own) = step(plain), step(ours)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-10, atol=1e-10)


def test_dropout_is_drawn_in_training_alone():
    plain, ours, replaced = models(lora_dropout=0.5)
    assert replaced == 14
    first, again, other = step(ours, 1)[0], step(ours, 1)[0], step(ours, 2)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(step(ours.eval())[0], step(plain.eval())[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["disabled", "merged", "unloaded"])
def test_peft_can_switch_an_adapter_off_merge_it_and_take_it_out(way):
    def outcome(model):
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            if way == "disabled":
                with model.disable_adapter():
                    return model(input_ids=ids).logits
            model = model.merge_and_unload() if way == "unloaded" else model
            if way == "merged":
                model.merge_adapter()
            return model(input_ids=ids).logits

    plain, ours, _ = models()
    torch.testing.assert_close(outcome(ours), outcome(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputed_activations_have_the_same_masks(dropout):
    _, ours, _ = models(lora_dropout=dropout)
    expected = step(ours)[1]
    ours.zero_grad()
    ours.activation_checkpointing_enable({"use_reentrant": False})
    found = step(ours)[1]
    assert any(getattr(module, "gradient_checkpointing", False) for module in ours.modules())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("function", [_Projection, _GatedProjection])
def test_gradients_are_those_of_finite_differences(function, dropout):
    """With dropout, too: the same seed draws the same mask for each evaluation."""
    draw = torch.Generator().manual_seed(3)

    def numbers(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)

    entering = [numbers(2, 3, 5) for _ in range(2 if function is _GatedProjection else 1)]
    frozen, bias, a, b = numbers(4, 5).detach(), numbers(4).detach(), numbers(2, 5), numbers(4, 2)

    def seeded(*given):
        torch.manual_seed(0)
        *entering, a, b = given
        return function.apply(*entering, frozen, bias, a, b, 1.5, dropout)

    assert gradcheck(seeded, (*entering, a, b))


def test_dropped_entries_stand_still_and_others_are_scaled():
    torch.manual_seed(0)
    x = torch.ones(1, 2000, 1, dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    y = _Projection.apply(x, zero, None, one, one, 1.0, 0.25)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs((y == 0).double().mean() - 0.25) < 0.05


def test_keeps_the_two_halves_of_the_mlp_alone():
    """Tensors of the MLP's width that a step keeps: gate and up, where autograd keeps four."""

    def kept(model) -> int:
        found = set()

        def pack(tensor):
            if tensor.shape[-1] == GEOMETRY["intermediate_size"] and tensor.dim() > 1 and tensor.shape[-2] > 4:
                found.add(tensor.untyped_storage().data_ptr())
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(model)
        return len(found - weights)

    plain, ours, _ = models(modules=ALL, layers_to_transform=[2])
    assert (kept(plain), kept(ours)) == (4, 2)
