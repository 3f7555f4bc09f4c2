"""A stage's scores: a sink for its final hidden states, with a journal that a killed run is continued from."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.tensor_names import EMBEDDING
from mistral_prune_lora.errors import CheckpointError, NumberError
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.models.ends import outside_entries
from mistral_prune_lora.models.window_scores import Head, score_batch
from mistral_prune_lora.provenance import record_sha256
from mistral_prune_lora.results.statistics import WindowScores
from mistral_prune_lora.storage.activations import open_finished
from mistral_prune_lora.storage.finite import all_finite, mend_for
from mistral_prune_lora.storage.journal import Journal, say_left_out
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.record import RunRecord, checked_sha256
from mistral_prune_lora.streaming.run import KeptActivations


@dataclass(frozen=True)
class DenseAnswers:
    """The dense model's answers to the same windows, to measure KL(dense || stage) against.

    Attributes:
        model: the dense model, for its norm and head.
        hidden: a file of its final hidden states, before the norm.
    """

    model: Checkpoint
    hidden: Path

    def sha256(self, run: RunRecord) -> str:
        """Identifies them: what was run to the hidden states, and the head that is applied to those.

        Raises:
            CheckpointError: the head is not what the record of whoever wrote it says.
        """
        outside = outside_entries(self.model)
        head = checked_sha256(self.model, {name: entry for name, entry in outside.items() if name != EMBEDDING})
        tied = checked_sha256(self.model, {"weight": outside[head_name(self.model)]})
        return record_sha256({"hidden": run.content(), "head": head, "projection": tied})


class Scoring:
    """Scores the windows of one stage; a sink and a context manager.

    Attributes:
        record: of the stage, with norm and head.
        place: the journal, in which every finished batch has its scores.
        words: what the progress bar says.
    """

    def __init__(
        self,
        passage: Passage,
        place: Path,
        run: RunRecord,
        words: str,
        *,
        dense: DenseAnswers | None = None,
        final_hidden: str | Path | None = None,
    ) -> None:
        """Take up what a killed run has left.

        Args:
            passage: the windows, and how they are run; its model gives norm and head.
            place: the journal's path.
            run: the record of all of the stage's layers.
            words: what is run: "stage AB".
            dense: to compare with.
            final_hidden: also keep the final hidden states (before the norm) in this file.

        Raises:
            PipelineError: another process holds the journal, or a file cannot be written.
            DataError, CheckpointError: the dense model's answers are not to these windows; these are no running text.
        """
        passage.windows.check_running_text("perplexity")
        self.place, self.words, self._passage, self._dense = place, words, passage, dense
        self.record = run.with_head(passage.model)
        self._taught = None
        if dense:
            self._taught = replace(passage, model=dense.model).boundary(dense.hidden)
            self.record = replace(self.record, dense=dense.sha256(self._taught.whole_record))
        with ExitStack() as held:
            self._journal = held.enter_context(Journal(place, {"run": self.record.content()}))
            self._scores = self._believed()
            self._final: KeptActivations | None = None
            if final_hidden and not open_finished(Path(final_hidden), run.content()):
                self._final = held.enter_context(
                    KeptActivations(final_hidden, passage.shape, passage.compute, run.content())
                )
            self._held = held.pop_all()

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    @property
    def done(self) -> Collection[int]:
        """The batches that are scored and, if that is asked for, whose final hidden states are kept."""
        return self._scores.keys() & self._final.done if self._final else self._scores.keys()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to run."""
        return len(self.done) == len(self._passage.batches)

    @property
    def nbytes(self) -> int:
        """Memory that the heads take, scoring a block included."""
        return sum(head.nbytes for head in self._heads)

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Score a batch of final hidden states."""
        if self._final:
            self._final.put(batch, hidden)
        if batch in self._scores:
            return
        span = self._passage.windows_of(batch)
        taught = (self._heads[1], self._taught.read(span.start, span.stop)) if self._taught else None
        scores = score_batch(self._heads[0], hidden, self._passage.ids_of(batch), taught)
        self._check(scores, span.start, hidden)
        self._scores[batch] = scores
        self._journal.append({"batch": batch, **scores.content()})

    def flush(self) -> None:
        """Wait for final hidden states that are still on their way to the disk."""
        if self._final:
            self._final.flush()

    def status(self) -> str:
        """The perplexity so far."""
        scores, predicted = self._scores.values(), self._passage.windows.seqlen - 1
        mean = sum(float(s.nll.sum()) for s in scores) / (sum(len(s.nll) for s in scores) * predicted)
        return f"ppl {math.exp(min(mean, 700.0)):.4f}"

    def finish(self) -> WindowScores:
        """The scores of all windows; the final hidden states are put in their place.

        Raises:
            ValueError: batches are missing.
        """
        if not self.is_complete:
            raise ValueError(f"{len(self._passage.batches) - len(self.done)} batches are missing")
        if self._final:
            self._final.finish()
        return WindowScores.concatenate(self._scores[batch] for batch in sorted(self._scores))

    def forget(self) -> None:
        """Remove the journal: its result is kept elsewhere."""
        self.place.unlink(missing_ok=True)

    def _believed(self) -> dict[int, WindowScores]:
        """The scores in the journal by batch, without entries that cannot be of these windows."""
        found: dict[int, WindowScores] = {}
        for entry in self._journal.entries:
            batch = entry.get("batch")
            if type(batch) is int and batch in self._passage.batches and batch not in found:
                scores = WindowScores.parse(entry, len(self._passage.ids_of(batch)), taught=self._dense is not None)
                found |= {batch: scores} if scores else {}
        if len(found) < len(self._journal.entries):
            say_left_out(self.place, len(self._journal.entries) - len(found))
        return found

    @cached_property
    def _heads(self) -> list[Head]:
        """The model's head, and the dense model's where there is one; read when something is left to score."""
        models = [self._passage.model, *([self._dense.model] if self._dense else [])]
        compute = self._passage.compute
        heads = [Head(model, compute.dtype, compute.device) for model in models]
        if len({head.vocabulary for head in heads}) > 1:
            raise CheckpointError(
                f"predicts {heads[0].vocabulary} tokens and the dense model {heads[1].vocabulary}, which cannot be"
                " compared",
                where=self._passage.model.path,
                mend="Evaluate the two apart from each other",
            )
        return heads

    def _check(self, scores: WindowScores, first: int, hidden: torch.Tensor) -> None:
        """Raise a NumberError if a batch's scores are none; with its window if the hidden states are none already."""
        fault = scores.first_not_finite()
        if fault is None:
            return
        window = first + fault
        said = f"{self.words}: the score of window {self._passage.first + window} is NaN or infinity"
        if not all_finite(hidden[fault]):
            raise NumberError(said, window=window)
        if self._taught and (error := self._taught.fault(window)):
            raise error
        mend = mend_for(self._passage.compute.dtype)
        raise NumberError(f"{said}: its logits are", where=self._passage.model.path, mend=mend)
