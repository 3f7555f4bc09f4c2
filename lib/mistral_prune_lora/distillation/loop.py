"""The training loop: updates one after the other, each a function of the state before it and of its number.

So a run that was killed and goes on from a saved state ends with the bytes of one that was not: the windows of an
update follow from the seed and its number, dropout is seeded anew for each, and everything else is in the state.
"""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from tqdm import tqdm

from mistral_prune_lora.console import progress
from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Batch, Shelf
from mistral_prune_lora.distillation.curve import Logger, Table
from mistral_prune_lora.distillation.held_out import HeldOut
from mistral_prune_lora.distillation.loss import HeadLoss
from mistral_prune_lora.distillation.ranks import Ranks
from mistral_prune_lora.distillation.schedule import batches_of_updates, rate_share
from mistral_prune_lora.distillation.settings import TrainingSettings
from mistral_prune_lora.distillation.teacher import Teacher
from mistral_prune_lora.distillation.unfinished import State
from mistral_prune_lora.errors import NumberError, PipelineError
from mistral_prune_lora.storage.finite import all_finite

_CALMER = (
    "use a smaller learning rate or more warm-up, bf16 or fp32 instead of fp16, or skip_spikes; nothing was written,"
    " and the last saved state is kept"
)
_SPIKE_HISTORY = 20  # updates that a loss is held against


@dataclass
class Outcome:
    """What a training has come to besides its weights.

    Attributes:
        updates: how many were made, those that were left out included.
        kept_step: the update after which the adapter that is kept stood.
        skipped: updates that were left out for their loss.
        ended_early: whether patience ended it.
    """

    updates: int = 0
    kept_step: int = 0
    skipped: int = 0
    ended_early: bool = False


@dataclass
class Watch:
    """Where a training is looked at and kept: curves, loggers, and how its state is saved.

    Attributes:
        curve, held_out: the tables.
        loggers: what else is told.
        save: keeps a state; None in processes that write nothing.
        save_steps: updates between two saved states.
    """

    curve: Table
    held_out: Table
    loggers: Sequence[Logger] = ()
    save: Callable[[State], None] | None = None
    save_steps: int = 50


@dataclass
class _Best:
    rank: float = math.inf
    step: int = 0
    stale: int = 0
    weights: list[torch.Tensor] = field(default_factory=list)


class Loop:
    """One training.

    Attributes:
        step: updates that are done.
        outcome: see there.
    """

    def __init__(
        self,
        student: AdaptedStudent,
        teacher: Teacher | None,
        shelf: Shelf,
        held_out: HeldOut | None,
        settings: TrainingSettings,
        watch: Watch,
        ranks: Ranks,
    ) -> None:
        """Make it ready to run; nothing is computed yet.

        Args:
            student: what is trained, in place.
            teacher: whom it learns from; None trains on cross-entropy alone.
            shelf: the training windows and what is stored of them.
            held_out: windows beside them; None looks at none.
            settings: everything that decides what comes out.
            watch: where it is told and kept.
            ranks: the processes that train together.
        """
        self._student, self._teacher, self._shelf, self._held_out = student, teacher, shelf, held_out
        self._settings, self._watch, self._ranks = settings, watch, ranks
        head = None if teacher is None else teacher.same_head(student.head)
        self._loss = HeadLoss(settings.loss, student.head, head)
        optimiser = settings.optimiser
        # An adapter is hundreds of small matrices: on a CPU, one call instead of several for each.
        self._updater = torch.optim.AdamW(
            student.trained,
            lr=optimiser.learning_rate,
            weight_decay=optimiser.weight_decay,
            fused=shelf.device.type == "cpu" or None,
        )
        self.step, self.outcome, self._best = 0, Outcome(), _Best()

    def run(self) -> Outcome:
        """Train to the end.

        Raises:
            NumberError: a loss, the gradient's norm, or at the end a weight is NaN or infinity.
            SystemExit: the process was asked to end, by SIGTERM or Ctrl-C; the state after the current update is saved.
        """
        optimiser, total = self._settings.optimiser, self._settings.optimiser.steps
        updates = batches_of_updates(len(self._shelf.windows), optimiser, self._settings.seed, self._ranks.world)
        mine, chosen = itertools.tee(itertools.islice(updates, self.step, total))
        batches = self._shelf.ahead(batch for update in mine for batch in self._ranks.share(update))
        self._student.model.train()
        with (
            progress(total=total, description="train", unit="step", initial=self.step) as bar,
            _asked_to_end() as asked,
        ):
            if self.step == 0:
                self._look()
            for update in chosen:
                started = time.monotonic()
                self._update(update, batches)
                self._tell(bar, time.monotonic() - started)
                last = self.step == total or self._look_if_due()
                if self._ranks.any(bool(asked)) and not last:
                    _end(asked, self.step, saved=self._save())
                if last:
                    break
                if self._watch.save_steps and self.step % self._watch.save_steps == 0:
                    self._save()
            batches.close()
        self._finish()
        return self.outcome

    def _update(self, update: list[list], batches: Iterator[Batch]) -> None:
        """One update of the weights, or a spike that is left out; adds its row to the curve."""
        optimiser = self._settings.optimiser
        rate = optimiser.learning_rate * rate_share(self.step, optimiser)
        for group in self._updater.param_groups:
            group["lr"] = rate
        # Of every update's own number, and so the same whether the run was interrupted or not.
        torch.manual_seed(((self._settings.seed * 1_000_003 + self.step) * 4096 + self._ranks.rank) % (1 << 63))
        total = sum(self._shelf.predictions(batch) for batch in update)
        sums = torch.zeros(3, dtype=torch.float64, device=self._shelf.device)
        for _ in self._ranks.share(update):
            sums += self._add_gradients(next(batches))
        gradients = [p.grad for p in self._student.trained if p.grad is not None]
        self._ranks.sum(sums, *gradients)
        # Here, in float32: in the 16 bits that they come through, numbers so much smaller would be lost.
        for gradient in gradients:
            gradient.div_(total)
        norm = torch.nn.utils.clip_grad_norm_(self._student.trained, optimiser.max_grad_norm)
        loss, kl, ce, length = torch.cat([sums / total, norm.double().view(1)]).tolist()
        self._check(update, {"loss": loss, "cross-entropy": ce, "gradient's norm": length}, kl)
        skipped = self._is_spike(loss)
        if not skipped:
            self._updater.step()
        self._updater.zero_grad(set_to_none=True)
        self.step += 1
        self.outcome.skipped += skipped
        tokens = sum(map(len, update)) * self._shelf.windows.seqlen
        self._watch.curve.add((self.step, loss, kl, ce, rate, length, tokens, skipped))

    def _add_gradients(self, batch: Batch) -> torch.Tensor:
        """Add the gradients of one batch, summed over its tokens; returns loss, divergence and cross-entropy, too."""
        finals, watched = self._student.finals(batch)
        taught, taught_layer = None, None
        if self._teacher is not None:
            answer, taught_layer = self._teacher.answer(batch)
            taught = batch.scored(answer)
        sums = torch.zeros(3, dtype=torch.float64, device=batch.ids.device)
        roots, gradients = [], []
        for share, hidden in finals:
            final = batch.scored(hidden)
            told, gradient = self._loss(final.detach(), batch.targets, taught)
            sums += share * told
            roots.append(final)
            gradients.append(gradient.mul_(share))
        if watched is not None and taught_layer is not None and self._settings.loss.hidden:
            weight = self._settings.loss.hidden.weight
            ours, theirs = (_precise(batch.scored(states)) for states in (watched, taught_layer))
            near = functional.cosine_similarity(ours, theirs, dim=-1)
            away = (1 - near).sum()
            sums[0] += weight * away.detach()
            roots.append(away)
            gradients.append(torch.full_like(away, weight))
        torch.autograd.backward(roots, gradients)
        return sums

    def _check(self, update: list[list], values: dict[str, float], kl: float) -> None:
        """Raise a NumberError that names update and windows if one of some values is NaN or infinity."""
        if self._teacher is not None:
            values = {"loss": values["loss"], "divergence": kl, **values}
        wrong = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if wrong is None:
            return
        windows = sorted({window for batch in update for window in batch})
        shown = ", ".join(map(str, windows[:10])) + (f" and {len(windows) - 10} more" if len(windows) > 10 else "")
        raise NumberError(
            f"the {wrong} of step {self.step + 1} (windows {shown}) is {values[wrong]}, so training ends here",
            mend=_CALMER,
        )

    def _is_spike(self, loss: float) -> bool:
        factor = self._settings.skip_spikes
        if factor is None:
            return False
        columns = self._watch.curve.columns
        # With those that were left out: what stays high for half of them is no spike, and is trained on again.
        former = [row[columns.index("loss")] for row in self._watch.curve.rows[-_SPIKE_HISTORY:]]
        return len(former) == _SPIKE_HISTORY and loss > factor * statistics.median(former)

    def _tell(self, bar: tqdm, seconds: float) -> None:
        row = dict(zip(self._watch.curve.columns, self._watch.curve.rows[-1], strict=True))
        rate = row["tokens"] / seconds if seconds else 0.0
        divergence = "" if math.isnan(row["kl"]) else f" KL {row['kl']:.4f}"
        bar.set_postfix_str(f"loss {row['loss']:.4f}{divergence} CE {row['ce']:.4f} {rate:.0f} tok/s", refresh=False)
        bar.update()
        for logger in self._watch.loggers:
            values = {name: value for name, value in row.items() if name != "step" and not math.isnan(value)}
            logger.log(self.step, {**values, "tokens_per_second": rate})

    def _look_if_due(self) -> bool:
        """Look at the held-out windows if it is time to; returns whether patience is at its end."""
        if self._held_out is None or self.step % self._settings.held_out.eval_steps:
            return False
        self._look()
        patience = self._settings.held_out.patience
        self.outcome.ended_early = patience is not None and self._best.stale >= patience
        return self.outcome.ended_early

    def _look(self) -> None:
        if self._held_out is None:
            return
        score = self._held_out.score(self._student)
        told = (score.ppl, score.mean_nll, score.kl, score.agreement)
        self._watch.held_out.add((self.step, *told))
        for logger in self._watch.loggers:
            named = zip(self._watch.held_out.columns[1:], told, strict=True)
            logger.log(self.step, {f"held_out/{name}": value for name, value in named if math.isfinite(value)})
        if score.rank < self._best.rank:
            weights = [p.detach().cpu().clone() for p in self._student.trained] if self._keeps_best else []
            self._best = _Best(score.rank, self.step, 0, weights)
        else:
            self._best.stale += 1

    @property
    def _keeps_best(self) -> bool:
        return self._held_out is not None and self._settings.held_out.keep == "best"

    def _finish(self) -> None:
        """Look a last time, take the adapter that is to be kept, and check it."""
        looked = {row[0] for row in self._watch.held_out.rows}
        if self.step not in looked:
            self._look()
        self.outcome.updates = self.outcome.kept_step = self.step
        if self._keeps_best and self._best.weights:
            self.outcome.kept_step = self._best.step
            with torch.no_grad():
                for parameter, kept in zip(self._student.trained, self._best.weights, strict=True):
                    parameter.copy_(kept)
        if not all(all_finite(weight) for weight in self._student.trained):
            raise NumberError(f"after {self.step} steps weights are NaN or infinity", mend=_CALMER)

    def _save(self) -> bool:
        """Save the state. Where that cannot be, the former one stays, and the training goes on all the same."""
        if self._watch.save is None:
            return False
        try:
            self._watch.save(self.state())
        except PipelineError as error:
            print(f"warning: the state after step {self.step} is not saved: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def state(self) -> State:
        """Everything that the next update depends on, and what is told at the end."""
        tensors = {"curve": self._watch.curve.tensor(), "held_out": self._watch.held_out.tensor()}
        for number, parameter in enumerate(self._student.trained):
            tensors[f"weight.{number}"] = parameter
            for name, value in self._updater.state[parameter].items():
                tensors[f"{name}.{number}"] = value
        tensors |= {f"best.{number}": weight for number, weight in enumerate(self._best.weights)}
        best = None if math.isinf(self._best.rank) else self._best.rank
        facts = {
            "best_rank": best, "best_step": self._best.step, "stale": self._best.stale, "skipped": self.outcome.skipped,
        }  # fmt: skip
        return State(self.step, tensors, facts)

    def restore(self, state: State) -> None:
        """Go on from a state of the same training; its curves are the caller's to begin with."""
        self.step, facts = state.step, state.facts
        device = self._shelf.device
        with torch.no_grad():
            for number, parameter in enumerate(self._student.trained):
                parameter.copy_(state.tensors[f"weight.{number}"])
                kept = {"exp_avg": device, "exp_avg_sq": device, "step": torch.device("cpu")}
                if f"exp_avg.{number}" in state.tensors:
                    moments = {name: state.tensors[f"{name}.{number}"].to(place) for name, place in kept.items()}
                    self._updater.state[parameter] = moments
        weights = [
            state.tensors[f"best.{n}"] for n in range(len(self._student.trained)) if f"best.{n}" in state.tensors
        ]
        rank = math.inf if facts["best_rank"] is None else facts["best_rank"]
        self._best = _Best(rank, facts["best_step"], facts["stale"], weights)
        self.outcome.skipped = facts["skipped"]


def _precise(states: torch.Tensor) -> torch.Tensor:
    """Hidden states in float32, or in float64 if they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


@contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """A list that SIGTERM and the first Ctrl-C put their number into; a second Ctrl-C ends at once."""
    asked: list[int] = []

    def note(number: int, frame) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("asked to end: after this update the state is saved", file=sys.stderr, flush=True)

    try:
        former = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone is told of signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _end(asked: list[int], step: int, *, saved: bool) -> None:
    number = asked[0] if asked else int(signal.SIGTERM)
    if not saved:
        raise SystemExit(128 + number)
    print(
        f"ended by {signal.Signals(number).name} after step {step}: the same command goes on from there",
        file=sys.stderr,
    )
    raise SystemExit(128 + number)
