"""The loss at the head against plain autograd on whole logits, in float64: values and gradients."""

import pytest
import torch
from torch.nn import functional

from mistral_prune_lora.distillation import loss as loss_module
from mistral_prune_lora.distillation.loss import HeadLoss
from mistral_prune_lora.distillation.settings import KD_LOSSES, LossSettings
from mistral_prune_lora.errors import PipelineError

TOKENS, VOCABULARY, HIDDEN = 50, 300, 32


def drawn(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    hidden, taught = torch.randn(2, TOKENS, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    head, teacher_head = (torch.randn(2, VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64) / 2).to(dtype)
    return hidden, head, taught, teacher_head, torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)


def plain(z, q, targets, settings):
    """The textbook's formulas on whole logits."""
    t, ce = settings.temperature, functional.cross_entropy(z, targets, reduction="sum")
    if q is None:
        return (1 - settings.kd_alpha) * ce, torch.tensor(float("nan")), ce
    log_s, log_t = (z / t).log_softmax(-1), (q / t).log_softmax(-1)

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum()

    middle = ((log_s.exp() + log_t.exp()) / 2).log()
    divergence = {
        "forward_kl": lambda: kl(log_t, log_s),
        "reverse_kl": lambda: kl(log_s, log_t),
        "js": lambda: (kl(log_t, middle) + kl(log_s, middle)) / 2,
    }[settings.kd_loss]()
    return settings.kd_alpha * t * t * divergence + (1 - settings.kd_alpha) * ce, divergence, ce


@pytest.fixture(params=[(7, 3), (50, 50), (13, 1)], ids=["blocks", "whole", "single rows"])
def blocks(request, monkeypatch):
    for name, rows in zip(("_BLOCK", "_SLICE"), request.param, strict=True):
        monkeypatch.setitem(getattr(loss_module, name), "cpu", VOCABULARY * rows)


@pytest.mark.parametrize("kd_loss", KD_LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_value_and_gradient_are_those_of_autograd(blocks, kd_loss, temperature, alpha):
    hidden, head, taught, teacher_head, targets = drawn()
    settings = LossSettings(alpha, temperature, kd_loss)
    leaf = hidden.clone().requires_grad_()
    wanted = plain(leaf @ head.T, taught @ teacher_head.T, targets, settings)
    wanted[0].backward()
    sums, gradient = HeadLoss(settings, head, teacher_head)(hidden, targets, taught)
    torch.testing.assert_close(sums, torch.stack([w.detach() for w in wanted]), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-10)


def test_without_a_teacher_it_is_cross_entropy(blocks):
    hidden, head, _, _, targets = drawn()
    settings, leaf = LossSettings(0.0), hidden.clone().requires_grad_()
    wanted = plain(leaf @ head.T, None, targets, settings)
    wanted[0].backward()
    sums, gradient = HeadLoss(settings, head, None)(hidden, targets, None)
    torch.testing.assert_close(sums[[0, 2]], torch.stack([wanted[0], wanted[2]]).detach(), rtol=1e-12, atol=1e-10)
    assert sums[1].isnan()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kd_loss", KD_LOSSES)
def test_probabilities_that_underflow_count_as_none(kd_loss):
    hidden, head, taught, teacher_head, targets = drawn(torch.float32)
    settings = LossSettings(0.5, 1.0, kd_loss)
    sums, gradient = HeadLoss(settings, head * 40, teacher_head * 40)(hidden, targets, taught)
    assert sums.isfinite().all() and gradient.isfinite().all()


def test_buffers_are_three_blocks_at_most_and_are_used_again(monkeypatch):
    monkeypatch.setitem(loss_module._BLOCK, "cpu", VOCABULARY * 20)
    hidden, head, taught, teacher_head, targets = drawn(torch.float32)
    loss = HeadLoss(LossSettings(0.5, 2.0), head, teacher_head)
    loss(hidden, targets, taught)
    first = [buffer.data_ptr() for buffer in loss._buffers]
    assert sum(buffer.nbytes for buffer in loss._buffers) <= 3 * 20 * VOCABULARY * 4
    loss(hidden[:11], targets[:11], taught[:11])
    assert [buffer.data_ptr() for buffer in loss._buffers] == first


def test_no_tokens_have_no_loss_and_no_gradient():
    hidden, head, taught, teacher_head, targets = drawn()
    sums, gradient = HeadLoss(LossSettings(), head, teacher_head)(hidden[:0], targets[:0], taught[:0])
    assert sums.tolist() == [0, 0, 0] and gradient.shape == (0, HIDDEN)


def test_bf16_logits_are_those_of_the_compute_dtype():
    hidden, head, taught, teacher_head, targets = drawn(torch.bfloat16)
    settings = LossSettings(0.5, 2.0)
    leaf = hidden.clone().requires_grad_()
    wanted = plain((leaf @ head.T).float(), (taught @ teacher_head.T).float(), targets, settings)
    wanted[0].backward()
    sums, gradient = HeadLoss(settings, head, teacher_head)(hidden, targets, taught)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(sums.float(), torch.stack([w.detach() for w in wanted]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient, leaf.grad, rtol=2e-2, atol=2e-2)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(PipelineError, match="kd_loss is 'l2'"):
        LossSettings(kd_loss="l2")
