"""The loss of distillation, block by block of tokens, so that the logits of a whole batch never exist."""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch.nn import functional

from mistral_prune_lora.distillation.settings import LossSettings

BLOCK_LOGITS = 1 << 25  # logits of one block of tokens: 128 MB of float32, once each for student and teacher


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of Hinton et al. 2015 (https://arxiv.org/abs/1503.02531, section 2) summed over tokens, in float32.

    The factor temperature^2 keeps the gradient of the soft part as large as that of the hard part.

    Args:
        student, teacher: logits, shape (tokens, vocabulary). Without a teacher there is no KL (it is NaN), and the
            loss is the cross-entropy's part.
        targets: the true next tokens, int64, shape (tokens,).
        settings: weights of the two parts.

    Returns:
        Loss, KL(teacher || student) at the temperature, cross-entropy; each summed over tokens, scalar float32.
    """
    student, t = student.float(), settings.temperature
    ce = functional.cross_entropy(student, targets, reduction="sum")
    if teacher is None:
        return (1 - settings.kd_alpha) * ce, torch.full_like(ce, math.nan), ce
    kl = functional.kl_div(
        (student / t).log_softmax(-1), (teacher.float() / t).log_softmax(-1), log_target=True, reduction="sum"
    )
    return settings.kd_alpha * (t * t) * kl + (1 - settings.kd_alpha) * ce, kl, ce


def backward(
    model: PeftModel,
    ids: torch.Tensor,
    taught: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    settings: LossSettings,
    total: int,
) -> torch.Tensor:
    """Add the gradients of one batch.

    The head and the loss go in blocks of tokens. Each block's gradient stops at the final hidden states; one backward
    pass through the layers follows, so logits of more than a block never exist.

    Args:
        model: the student with its adapter.
        ids: token ids, int64, shape (n, seqlen).
        taught: the teacher's final hidden states after the norm, shape (n, seqlen, hidden); None without a teacher.
        teacher_head: the teacher's output projection, shape (vocabulary, hidden); None without a teacher.
        settings: weights of the loss's parts.
        total: predicted tokens of the whole step, by which the gradient is divided.

    Returns:
        Loss, KL and cross-entropy summed over the batch's tokens, float64, shape (3,).
    """
    whole = model.get_base_model()
    decoder, head = whole.get_submodule("model"), whole.get_submodule("lm_head")
    hidden = decoder(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets, expected = ids[:, 1:].flatten(), None
    answers = None if taught is None else taught[:, :-1].flatten(0, 1)
    cut = hidden.detach().requires_grad_(True)
    sums = torch.zeros(3, dtype=torch.float64)
    block = max(1, BLOCK_LOGITS // head.get_parameter("weight").shape[0])
    for start in range(0, len(targets), block):
        part = slice(start, start + block)
        if answers is not None and teacher_head is not None:
            with torch.no_grad():
                expected = functional.linear(answers[part], teacher_head)
        parts = distillation_loss(head(cut[part]), expected, targets[part], settings)
        (parts[0] / total).backward()
        sums += torch.stack([p.detach().double().cpu() for p in parts])
    hidden.backward(cut.grad)
    return sums
