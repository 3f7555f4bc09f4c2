"""The loss of distillation at the head, with its gradient written out, block by block of tokens.

Autograd would keep the logits of a whole batch, in float32, for student and teacher, several times over. Here a block's
logits live in two buffers that are used again for the next block, and the gradient takes the place of the student's.
What is done to them element by element is done in slices of few rows, which stay in a CPU's cache.

The gradients, for s = softmax(z / T) of the student's logits z and t = softmax(q / T) of the teacher's q:

    forward KL   T^2 KL(t || s)                      T (s - t)
    reverse KL   T^2 KL(s || t)                      T s (log(s / t) - KL(s || t))
    JS           T^2 (KL(t || m) + KL(s || m)) / 2   T s (log(s / m) - KL(s || m)) / 2,  m = (s + t) / 2
    CE           -log softmax(z)[target]             softmax(z) - onehot(target)

T^2 keeps the gradient of the soft part as large as that of the hard part (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531, section 2).
"""

from __future__ import annotations

import math

import torch

from mistral_prune_lora.distillation.settings import LossSettings

# Logits in a block, and in a slice of it. A slice's two buffers make, with the block's two, at most three of a block's
# size. On a CPU a slice fits its cache; on a GPU few large kernels beat many small ones.
_BLOCK = {"cpu": 1 << 23, "cuda": 1 << 26}
_SLICE = {"cpu": 1 << 20, "cuda": 1 << 25}


class HeadLoss:
    """Head and loss of one training: logits, loss and its gradient at the final hidden states.

    Buffers are kept from call to call. Nothing here waits for the device.
    """

    def __init__(self, settings: LossSettings, head: torch.Tensor, teacher_head: torch.Tensor | None) -> None:
        """Take the output projections.

        Args:
            settings: what the loss is.
            head: the student's output projection, shape (vocabulary, hidden), in the compute dtype.
            teacher_head: the teacher's, shape (vocabulary, its hidden); None trains on cross-entropy alone.
        """
        self._settings, self._head, self._teacher_head = settings, head, teacher_head
        # Float64 stays, so that gradients can be held against others to ten digits.
        self._dtype = torch.promote_types(head.dtype, torch.float32)
        vocabulary, kind = head.shape[0], head.device.type
        self._rows = max(1, _BLOCK.get(kind, 1 << 26) // vocabulary)
        self._slice = max(1, min(_SLICE.get(kind, 1 << 25) // vocabulary, self._rows // 2))
        self._buffers: list[torch.Tensor] = []

    def __call__(
        self, hidden: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient of some tokens.

        Args:
            hidden: final hidden states after the norm, shape (tokens, hidden), in the compute dtype; its graph is not
                looked at.
            targets: the true next tokens, int64, shape (tokens,).
            taught: the teacher's final hidden states after its norm, shape (tokens, its hidden); None without one.

        Returns:
            Loss, divergence and cross-entropy, each summed over tokens, float64, shape (3,), on the device; without a
            teacher the divergence is NaN. And the gradient of the summed loss by `hidden`, of its shape and dtype.
        """
        if len(hidden) != len(targets) or (taught is not None and len(taught) != len(targets)):
            raise ValueError(f"{len(hidden)} hidden states, {len(targets)} targets, and a teacher's of another number")
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden)
        student, teacher, *scratch = self._room(len(targets))
        with torch.no_grad():
            for start in range(0, len(targets), self._rows):
                block = slice(start, min(start + self._rows, len(targets)))
                count = block.stop - block.start
                z, q = self._logits(hidden[block], self._head, student[:count]), None
                if taught is not None and self._teacher_head is not None:
                    q = self._logits(taught[block], self._teacher_head, teacher[:count])
                for first in range(0, count, self._slice):
                    rows = slice(first, min(first + self._slice, count))
                    room = [buffer[: rows.stop - rows.start] for buffer in scratch]
                    here = targets[block][rows]
                    sums += _rows_loss(z[rows], None if q is None else q[rows], here, self._settings, room)
                self._product(z, self._head, gradient[block])
        return sums, gradient

    def _logits(self, hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The logits in `out`: as the compute dtype has them, then as float32."""
        return self._product(hidden, head.T, out)

    def _product(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """left @ right in the dtype of `right`, into `out`; slice by slice where that is another one than theirs."""
        if left.dtype == right.dtype == out.dtype:
            return torch.mm(left, right, out=out)
        for first in range(0, len(left), self._slice):
            rows = slice(first, first + self._slice)
            out[rows] = torch.mm(left[rows].to(right.dtype), right)
        return out

    def _room(self, tokens: int) -> list[torch.Tensor]:
        rows = min(self._rows, tokens)
        if not self._buffers or self._buffers[0].shape[0] < rows:
            sizes = [rows, rows if self._teacher_head is not None else 0, *[min(self._slice, rows)] * 2]
            shape = self._head.shape[0]
            self._buffers = [self._head.new_empty((size, shape), dtype=self._dtype) for size in sizes]
        return self._buffers


def _rows_loss(
    z: torch.Tensor,
    q: torch.Tensor | None,
    targets: torch.Tensor,
    settings: LossSettings,
    scratch: list[torch.Tensor],
) -> torch.Tensor:
    """The sums of some tokens; `z`, their logits, becomes the gradient by them, and `q`, the teacher's, is used up."""
    alpha, t, s = settings.kd_alpha, settings.temperature, scratch[0]
    chosen = targets.unsqueeze(1)
    z.sub_(z.amax(-1, keepdim=True))
    true = z.gather(1, chosen)
    if q is None:
        weight = 1 - alpha
        total = _weighted_softmax(z, weight)
        divergence = torch.full_like(total, math.nan)
    else:
        s = torch.exp(z if t == 1 else torch.mul(z, 1 / t, out=s), out=s)
        normaliser = s.sum(-1, keepdim=True)
        s.div_(normaliser)
        divergence = _DIVERGENCES[settings.kd_loss](z, q, s, normaliser.log(), t, scratch[1])
        weight = 1 - alpha
        if t == 1:
            total = normaliser
            torch.mul(s, weight, out=z)
        else:
            total = _weighted_softmax(z, weight)
        z.add_(q, alpha=alpha)
    ce = total.log() - true
    z.scatter_add_(1, chosen, torch.full_like(true, -weight))
    loss = weight * ce if q is None else alpha * (t * t) * divergence + weight * ce
    return torch.cat([loss, divergence, ce], dim=1).double().sum(0)


def _weighted_softmax(z: torch.Tensor, weight: float) -> torch.Tensor:
    """Replace logits less their maximum by weight * softmax, with the roundings of softmax first; returns the sums."""
    total = z.exp_().sum(-1, keepdim=True)
    z.div_(total)
    if weight != 1:
        z.mul_(weight)
    return total


# Each takes the student's logits z less their maximum, the teacher's q, the student's s = softmax(z / T) and the
# logarithm of its normaliser, T, and a buffer. It returns the divergence, shape (rows, 1), and leaves in q the gradient
# of T^2 divergence by z. In a sum over the vocabulary a probability that has underflowed to 0 counts as 0.


def _forward_kl(z, q, s, log_normaliser, t, p) -> torch.Tensor:
    log_teacher = _teacher_softmax(q, t, p)
    # sum of p log(p / s); what is the same for all tokens of the vocabulary stands outside of the sum.
    divergence = q.sub_(z, alpha=1 / t).mul_(p).sum(-1, keepdim=True) + (log_normaliser - log_teacher)
    torch.sub(s, p, out=q)
    if t != 1:
        q.mul_(t)
    return divergence


def _reverse_kl(z, q, s, log_normaliser, t, buffer) -> torch.Tensor:
    log_teacher = _teacher_softmax(q, t, buffer)
    ratio = q.neg_().add_(z, alpha=1 / t).add_(log_teacher - log_normaliser)  # log(s / p)
    divergence = torch.mul(ratio, s, out=buffer).sum(-1, keepdim=True)
    ratio.sub_(divergence).mul_(s)
    if t != 1:
        ratio.mul_(t)
    return divergence


def _jensen_shannon(z, q, s, log_normaliser, t, p) -> torch.Tensor:
    log_teacher = _teacher_softmax(q, t, p)
    entropy = q.sub_(log_teacher).mul_(p).sum(-1, keepdim=True)  # sum of p log p
    middle = torch.add(s, p, out=q).mul_(0.5).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    of_teacher = entropy - p.mul_(middle).sum(-1, keepdim=True)
    ratio = middle.neg_().add_(z, alpha=1 / t).sub_(log_normaliser)  # log(s / m)
    of_student = torch.mul(ratio, s, out=p).sum(-1, keepdim=True)
    ratio.sub_(of_student).mul_(s).mul_(t / 2)
    return 0.5 * (of_teacher + of_student)


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "js": _jensen_shannon}


def _teacher_softmax(q: torch.Tensor, t: float, p: torch.Tensor) -> torch.Tensor:
    """Write softmax(q / T) into p, and q / T less its maximum into q; returns the logarithm of the normaliser."""
    if t != 1:
        q.mul_(1 / t)
    q.sub_(q.amax(-1, keepdim=True))
    torch.exp(q, out=p)
    normaliser = p.sum(-1, keepdim=True)
    p.div_(normaliser)
    return normaliser.log()
