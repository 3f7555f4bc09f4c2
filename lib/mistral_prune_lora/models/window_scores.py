"""From final hidden states to each window's NLL, correct tokens, KL from the dense model and agreement with it.

In blocks of tokens, so that logits never pile up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.tensor_names import NORM
from mistral_prune_lora.errors import NumberError
from mistral_prune_lora.models.config import head_name, model_config
from mistral_prune_lora.models.ends import build_norm
from mistral_prune_lora.results.statistics import WindowScores
from mistral_prune_lora.storage.finite import all_finite, tensor_fault

# In one block: 32 MB of float32. Smaller ones read the projection too often, larger ones leave the cache.
BLOCK_LOGITS = 1 << 23


class Head:
    """A model's final norm and output projection.

    Attributes:
        vocabulary: rows of the projection.
        nbytes: memory that it takes, scoring a block included.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Read both; with tied embeddings the projection is the embedding.

        Raises:
            CheckpointError: a tensor is missing.
            NumberError: one holds NaN or infinity. A projection's row of -infinity would pass unseen: its token, if it
                is never the true one, only makes the others likelier.
        """
        self._norm: nn.Module = build_norm(model_config(checkpoint), checkpoint, dtype, device)
        self._weight = checkpoint.read(head_name(checkpoint), dtype).to(device)
        for name, weight in ((NORM, self._norm.get_parameter("weight")), (head_name(checkpoint), self._weight)):
            if not all_finite(weight):
                raise tensor_fault(checkpoint.entries[name], dtype) or NumberError(
                    f"tensor {name} came to NaN or infinity in memory, not in its file",
                    where=checkpoint.entries[name].file,
                    mend="Run it again; if it comes again, check the machine",
                )
        self.vocabulary = self._weight.shape[0]
        self.nbytes = head_bytes(checkpoint, dtype)

    @torch.inference_mode()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm, any shape (..., hidden)."""
        return self._norm(hidden)

    @torch.inference_mode()
    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Float32 logits (tokens, vocabulary) of normed hidden states (tokens, hidden).

        The product itself is taken in the compute dtype, as the whole model takes it.
        """
        return functional.linear(normed, self._weight).float()


def head_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Memory that a model's head takes in `dtype`, scoring a block included."""
    vocabulary, hidden = checkpoint.entries[head_name(checkpoint)].shape
    return vocabulary * hidden * dtype.itemsize + 4 * 4 * max(BLOCK_LOGITS, vocabulary)


def block_slices(tokens: int, vocabulary: int) -> list[slice]:
    """Tokens cut into blocks of nearly equal size whose logits are at most BLOCK_LOGITS (one token at least)."""
    count = math.ceil(tokens / max(1, BLOCK_LOGITS // vocabulary))
    edges = [tokens * i // count for i in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


class DenseTokens(NamedTuple):
    """The dense model's answers to a block of tokens; made once for all models that are compared with it.

    Attributes:
        log_p, p: its log-probabilities and probabilities, float32, shape (tokens, vocabulary).
        best: its most likely tokens, shape (tokens,).
    """

    log_p: torch.Tensor
    p: torch.Tensor
    best: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> DenseTokens:
        """Those of its logits (tokens, vocabulary)."""
        log_p = logits.log_softmax(-1)
        return cls(log_p, log_p.exp(), logits.argmax(-1))


def score_batch(
    head: Head, hidden: torch.Tensor, ids: torch.Tensor, teacher: tuple[Head, torch.Tensor] | None = None
) -> WindowScores:
    """Score the windows of a batch: float32 cross-entropy, float64 sums.

    Blocks are cut within a window, so a window's score does not depend on which others are in its batch.

    Args:
        head: of the model that made `hidden`.
        hidden: final hidden states before the norm, shape (n, seqlen, hidden).
        ids: token ids, shape (n, seqlen); position i predicts token i + 1.
        teacher: the dense model's head, and its final hidden states of the same windows.
    """
    return score_models(head, [hidden], ids, teacher)[0]


@torch.inference_mode()
def score_models(
    head: Head, states: Iterable[torch.Tensor], ids: torch.Tensor, teacher: tuple[Head, torch.Tensor] | None = None
) -> list[WindowScores]:
    """Score the same windows after several models that have one head; each as `score_batch` scores it, bit for bit.

    What the dense model says of a block of tokens is worked out once for all of them.

    Args:
        head: of all models.
        states: final hidden states of each of them, as `score_batch` takes them; only what the norm makes of them is
            held at once.
        ids, teacher: as there.
    """
    blocks = block_slices(ids.shape[1] - 1, head.vocabulary)
    normed = [head.normed(hidden) for hidden in states]
    device = normed[0].device
    dense = None if teacher is None else teacher[0].normed(teacher[1].to(device))
    targets = ids[:, 1:].to(device, torch.long)
    sums = torch.zeros(len(normed), len(ids), 4, dtype=torch.float64, device=device)
    for window in range(len(ids)):
        for part in blocks:
            taught = None
            if teacher is not None and dense is not None:
                taught = DenseTokens.of(teacher[0].logits(dense[window, part]))
            for model, hidden in enumerate(normed):
                sums[model, window] += score_tokens(head.logits(hidden[window, part]), targets[window, part], taught)
    columns = [list(each.T.contiguous().cpu().numpy()) for each in sums]
    return [WindowScores(*(each if teacher else each[:2])) for each in columns]


def score_tokens(logits: torch.Tensor, targets: torch.Tensor, dense: DenseTokens | None) -> torch.Tensor:
    """NLL, correct, KL and agreement, summed over a block of tokens; float64, shape (4,)."""
    best = logits.argmax(-1)
    log_q = logits.log_softmax(-1)
    nll = -log_q.gather(-1, targets[:, None]).double().sum()
    kl = agree = torch.zeros((), dtype=torch.float64, device=logits.device)
    if dense is not None:
        agree = (dense.best == best).double().sum()
        kl = (dense.p * (dense.log_p - log_q)).sum(-1).double().sum()
    return torch.stack([nll, (best == targets).double().sum(), kl, agree])
