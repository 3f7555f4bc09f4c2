"""Windows that are not trained on: how close the student is to the dense model there, in the middle of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Shelf
from mistral_prune_lora.distillation.ranks import Ranks
from mistral_prune_lora.distillation.teacher import Teacher
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.models.window_scores import DenseTokens, block_slices, score_tokens
from mistral_prune_lora.text.windows import Windows


@dataclass(frozen=True)
class HeldOutScore:
    """Means over the scored tokens of windows that are not trained on.

    Attributes:
        mean_nll: in nats.
        kl: KL(dense || student) in nats, at temperature 1; NaN without a dense model.
        agreement: how often both find the same token the likeliest; NaN without a dense model.
    """

    mean_nll: float
    kl: float
    agreement: float

    @property
    def ppl(self) -> float:
        """exp(mean NLL); infinity where that is no float."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf

    @property
    def rank(self) -> float:
        """What is the smaller the better: the KL from the dense model, or the NLL without one."""
        return self.mean_nll if math.isnan(self.kl) else self.kl


class HeldOut:
    """Windows beside the training's, and the dense model's answers to them."""

    def __init__(self, shelf: Shelf, teacher: Teacher | None, ranks: Ranks) -> None:
        """Take them.

        Args:
            shelf: the windows, and what is stored of them.
            teacher: the dense model, opened for these windows; None measures the NLL alone.
            ranks: the processes that share them.
        """
        self._shelf, self._teacher, self._ranks = shelf, teacher, ranks

    def score(self, student: AdaptedStudent) -> HeldOutScore:
        """Measure the student as it is now; dropout is off meanwhile."""
        sums = torch.zeros(4, dtype=torch.float64, device=self._shelf.device)
        windows = self._ranks.share(range(len(self._shelf.windows)))
        with torch.no_grad(), _evaluating(student):
            for batch in self._shelf.ahead([[window] for window in windows]):
                taught = None if self._teacher is None else batch.scored(self._teacher.answer(batch)[0])
                for share, final in student.finals(batch)[0]:
                    sums += share * self._scored(batch.scored(final), batch.targets, taught, student.head)
        self._ranks.sum(sums)
        nll, _, kl, agree = (sums / self._shelf.windows.predicted_tokens).tolist()
        return HeldOutScore(nll, kl, agree) if self._teacher else HeldOutScore(nll, math.nan, math.nan)

    def _scored(
        self, hidden: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None, head: torch.Tensor
    ) -> torch.Tensor:
        """What `score_tokens` gives of some tokens; blocks are small: nothing is kept of them."""
        sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
        for block in block_slices(len(targets), head.shape[0]):
            dense = None
            if taught is not None and self._teacher is not None:
                dense = DenseTokens.of(functional.linear(taught[block], self._teacher.head).float())
            sums += score_tokens(functional.linear(hidden[block], head).float(), targets[block], dense)
        return sums


@contextmanager
def _evaluating(student: AdaptedStudent) -> Iterator[None]:
    was = student.model.training
    student.model.eval()
    try:
        yield
    finally:
        student.model.train(was)


def check_disjoint(training: Windows, held_out: Windows) -> None:
    """Raise a DataError if a window is trained on and held out, by its token ids."""
    known = {bytes(row.numpy().tobytes()) for row in training.ids}
    same = [number for number, row in enumerate(held_out.ids) if row.numpy().tobytes() in known]
    if same:
        raise DataError(
            f"{len(same)} of {len(held_out)} held-out windows are trained on, the first of them window {same[0]}",
            where="held_out",
            mend="hold out windows of another split or text, or fewer training windows",
        )
