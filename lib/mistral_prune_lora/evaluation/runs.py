"""A segment or a stage's tail, run: from token ids or boundary activations to activations or scores, resumable.

Batches that a killed run has finished are never computed again; what is computed has the bits of an undisturbed run,
since batch k is always the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.console import progress
from mistral_prune_lora.errors import CheckpointError, DataError, NumberError
from mistral_prune_lora.evaluation.faults import layers_blamed
from mistral_prune_lora.evaluation.perplexity import Head, score_batch
from mistral_prune_lora.evaluation.subject import (
    check_continues,
    extend_record,
    outside_entries,
    start_record,
    tensors_digest,
)
from mistral_prune_lora.models.load import head_name, model_config
from mistral_prune_lora.provenance import record_sha256
from mistral_prune_lora.results.statistics import WindowScores
from mistral_prune_lora.storage.activations import ActivationReader, ActivationWriter, open_finished
from mistral_prune_lora.storage.finite import all_finite, mend_for, tensor_fault
from mistral_prune_lora.storage.journal import Journal, say_left_out
from mistral_prune_lora.streaming.layers import (
    Backbone,
    Compute,
    DelayedStore,
    Embedding,
    LayerSource,
    embedding_bytes,
    resident_groups,
    stream_batches,
)
from mistral_prune_lora.text.windows import Windows


@dataclass(frozen=True)
class Teacher:
    """The dense model's answers to the same windows, to measure KL(dense || stage) against.

    Attributes:
        model: the dense model, for its norm and head.
        hidden: a file of its final hidden states, before the norm.
    """

    model: Checkpoint
    hidden: Path


class Start:
    """Where layers are run from: the token ids, or the boundary activations of a parent segment.

    Attributes:
        record: of the run that led there.
        read: gives the hidden states of windows a..b-1 as a CPU tensor (b - a, seqlen, hidden).
        nbytes: memory on the compute device that reading takes.
    """

    def __init__(self, model: Checkpoint, windows: Windows, compute: Compute, source: str | Path | None) -> None:
        self.nbytes = 0
        if source is None:
            self.nbytes = embedding_bytes(model, compute)
            self.record = start_record(model, windows, compute.dtype)
            self._model, self._windows, self._dtype, self._embedding = model, windows, compute.dtype, None
            self.read = self._embed
        else:
            reader = ActivationReader(source)
            check_continues(reader, model, windows, compute)
            self.record, self.read = reader.run, reader.read
        self._file = None if source is None else Path(source)

    def _embed(self, first: int, last: int) -> torch.Tensor:
        self._embedding = self._embedding or Embedding(self._model, self._dtype)
        return self._embedding(self._windows.ids[first:last])

    def fault(self, window: int) -> NumberError | None:
        """The error for a window whose hidden states hold NaN or infinity; None if they are numbers."""
        hidden = self.read(window, window + 1)[0]
        if all_finite(hidden):
            return None
        if self._file:
            return NumberError(
                f"window {window} holds NaN or infinity", where=self._file, mend="Delete it and run the same again"
            )
        position = next(i for i, token in enumerate(hidden) if not all_finite(token))
        row = int(self._windows.ids[window, position])
        return tensor_fault(self._model.entries["model.embed_tokens.weight"], self._dtype, slice(row, row + 1))


@dataclass(frozen=True)
class Ending:
    """What is kept at the end of a run, where that is not the hidden states that leave its last layer.

    Attributes:
        apply: makes what is kept of a batch of them; same shape and dtype.
        record: kept with it instead of the run's own.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    record: Mapping


def run_to_file(
    start: Start,
    sources: Sequence[LayerSource],
    windows: Windows,
    config: PreTrainedConfig,
    compute: Compute,
    output: Path,
    ending: Ending | None = None,
) -> None:
    """Run layers and keep the activations at their end; those that do not fit into memory at once go through files.

    Args:
        start: where they start from.
        sources: the layers, in order.
        windows, config, compute: what goes through them, and how.
        output: a file of activations.
        ending: what is kept in it; None means the hidden states that leave the last layer, with the run's record.
    """
    shape, scratch, remaining = (*windows.ids.shape, config.hidden_size), None, sources
    record, read, reserved, origin = start.record, start.read, start.nbytes, start
    # A killed run may have come some groups far, whatever memory it had.
    for number in reversed(range(1, len(sources))):
        file = _scratch_file(output, sources[number - 1].index)
        if file.is_file() and (reader := open_finished(file, extend_record(start.record, sources[:number], compute))):
            scratch, remaining, record, read, reserved = file, sources[number:], reader.run, reader.read, 0
            origin = None
            break
    groups = resident_groups(remaining, compute, config, windows.seqlen, reserved)
    backbone = Backbone(config, compute)
    for group in backbone.resident(groups):
        last = ending if group is groups[-1] else None
        target = output if group is groups[-1] else _scratch_file(output, group[-1].index)
        record = last.record if last else extend_record(record, group, compute)
        words = f"layers {group[0].index}-{group[-1].index}"
        with (
            ActivationWriter(target, shape, compute.dtype, compute.batch_size, record) as writer,
            _bar(words, windows, compute, writer.done) as bar,
            layers_blamed(origin, group, compute, words),
        ):
            store = DelayedStore(writer.write, compute)
            missing = [b for b in range(_batches(windows, compute)) if b not in writer.done]
            for batch, hidden in stream_batches(read, missing, len(windows), compute):
                hidden = backbone(hidden)
                store.put(batch, last.apply(hidden) if last else hidden)
                bar.update(hidden.shape[0] * hidden.shape[1])
            store.flush()
            writer.finish()
        if scratch:
            scratch.unlink()
        scratch, origin = target, None
        read = ActivationReader(target).read
    for leftover in output.parent.glob(f".{output.name}.after-*"):
        leftover.unlink()


class Scoring:
    """One stage's tail and score, with a journal that a killed run is continued from."""

    def __init__(
        self,
        model: Checkpoint,
        windows: Windows,
        compute: Compute,
        place: Path,
        teacher: Teacher | None,
        final_hidden: str | Path | None,
    ) -> None:
        self._model, self._windows, self._compute = model, windows, compute
        self._place, self._teacher = place, teacher
        self._final = Path(final_hidden) if final_hidden else None
        self._config = model_config(model)

    def run(
        self, start: Start | Callable[[], Start], tail: Sequence[LayerSource], words: str, record: dict | None = None
    ):
        """Score the stage; returns (its record with norm and head, scores of all windows).

        Args:
            start: a `Start`, or a function that gives it, called only if something is left to compute.
            tail: layers after it.
            words: what the progress bar says.
            record: of all layers, where the start is not there yet.
        """
        if record is None:
            record = extend_record(start.record, tail, self._compute)
        final_record = record
        record = self._with_head(record)
        teacher = self._teacher and ActivationReader(self._teacher.hidden)
        if teacher:
            check_continues(teacher, self._teacher.model, self._windows, self._compute)
            record = {**record, "dense": self._teacher_record(teacher)}
        with ExitStack() as held:
            journal = held.enter_context(Journal(self._place, {"run": record}))
            scores = self._believed(journal)
            writer = self._final_writer(final_record)
            if writer:
                held.enter_context(writer)
            wanted = [
                b
                for b in range(_batches(self._windows, self._compute))
                if b not in scores or (writer and b not in writer.done)
            ]
            if wanted:
                start = start() if callable(start) else start
                self._compute_missing(wanted, start, tail, words, journal, scores, writer, teacher)
            if writer:
                writer.finish()
        return record, WindowScores.concatenate(scores[b] for b in sorted(scores))

    def _believed(self, journal: Journal) -> dict[int, WindowScores]:
        """The scores in a journal by batch, without entries that cannot be of these windows."""
        scores, size = {}, self._compute.batch_size
        for entry in journal.entries:
            batch = entry.get("batch")
            if type(batch) is int and 0 <= batch < _batches(self._windows, self._compute) and batch not in scores:
                found = _scores(entry, min(size, len(self._windows) - batch * size), self._teacher is not None)
                scores |= {batch: found} if found else {}
        if len(scores) < len(journal.entries):
            say_left_out(journal.path, len(journal.entries) - len(scores))
        return scores

    def _final_writer(self, record: dict) -> ActivationWriter | None:
        if self._final is None or open_finished(self._final, record):
            return None
        shape = (*self._windows.ids.shape, self._config.hidden_size)
        return ActivationWriter(self._final, shape, self._compute.dtype, self._compute.batch_size, record)

    def _compute_missing(self, wanted, start, tail, words, journal, scores, writer, teacher) -> None:
        windows, compute = self._windows, self._compute
        heads = self._heads()
        reserved = sum(head.nbytes for head in heads) + start.nbytes
        *earlier, last = resident_groups(tail, compute, self._config, windows.seqlen, reserved) or [[]]
        scratch = self._place.with_suffix(".tail.safetensors")
        if earlier:
            before = [source for group in earlier for source in group]
            if not open_finished(scratch, extend_record(start.record, before, compute)):
                run_to_file(start, before, windows, self._config, compute, scratch)
            start = Start(self._model, windows, compute, scratch)
        backbone = Backbone(self._config, compute)
        for _ in backbone.resident([last]):
            done = set(range(_batches(windows, compute))) - set(wanted)
            with _bar(words, windows, compute, done) as bar, layers_blamed(start, last, compute, words):
                store = DelayedStore(writer.write, compute) if writer else None
                for batch, hidden in stream_batches(start.read, wanted, len(windows), compute):
                    hidden = backbone(hidden)
                    if store:
                        store.put(batch, hidden)
                    first = batch * compute.batch_size
                    span = slice(first, first + len(hidden))
                    taught = (heads[1], teacher.read(span.start, span.stop)) if teacher else None
                    if batch not in scores:
                        scores[batch] = score_batch(heads[0], hidden, windows.ids[span], taught)
                        self._check_scores(scores[batch], first, hidden, teacher, words)
                        journal.append({"batch": batch, **_listed(scores[batch])})
                    bar.set_postfix_str(f"ppl {_running_ppl(scores, windows.seqlen - 1):.4f}", refresh=False)
                    bar.update(hidden.shape[0] * hidden.shape[1])
                if store:
                    store.flush()
        scratch.unlink(missing_ok=True)

    def _heads(self) -> list[Head]:
        """The model's head, and the dense model's where there is one."""
        models = [self._model, *([self._teacher.model] if self._teacher else [])]
        heads = [Head(model, self._compute.dtype, self._compute.device) for model in models]
        if len({head.vocabulary for head in heads}) > 1:
            raise CheckpointError(
                f"predicts {heads[0].vocabulary} tokens and the dense model {heads[1].vocabulary}, which cannot be"
                " compared",
                where=self._model.path,
                mend="Evaluate the two apart from each other",
            )
        highest = int(self._windows.ids.max())
        if highest >= heads[0].vocabulary:
            raise DataError(
                f"there is the token id {highest}, and the model predicts {heads[0].vocabulary} tokens",
                where=self._windows.identity.tokenizer,
                mend="Use the tokenizer that the model was trained with",
            )
        return heads

    def _check_scores(self, scores: WindowScores, first: int, hidden, teacher, words: str) -> None:
        """Raise a NumberError if a batch's scores are none; with its window if the hidden states are none already."""
        fault = scores.first_not_finite()
        if fault is None:
            return
        window = first + fault
        said = f"{words}: the score of window {window} is NaN or infinity"
        if not all_finite(hidden[fault]):
            raise NumberError(said, window=window)
        if teacher and not all_finite(teacher.read(window, window + 1)):
            raise NumberError(
                f"window {window} holds NaN or infinity", where=teacher.path, mend="Delete it and run the same again"
            )
        raise NumberError(f"{said}: its logits are", where=self._model.path, mend=mend_for(self._compute.dtype))

    def _with_head(self, record: dict) -> dict:
        outside = outside_entries(self._model)
        named = {"norm": outside["model.norm.weight"], "lm_head": outside[head_name(self._model)]}
        digests = {name: tensors_digest({"weight": entry}) for name, entry in named.items()}
        parameters = sum(math.prod(entry.shape) for entry in outside.values())
        return {
            **record,
            "weights": record["weights"] | digests,
            "parameters": record["parameters"] + parameters,
        }

    def _teacher_record(self, teacher: ActivationReader) -> str:
        outside = outside_entries(self._teacher.model)
        head = tensors_digest({n: e for n, e in outside.items() if n != "model.embed_tokens.weight"})
        tied = tensors_digest({"weight": outside[head_name(self._teacher.model)]})
        return record_sha256({"hidden": teacher.run, "head": head, "projection": tied})

    def forget(self) -> None:
        """Remove the journal: its result is kept elsewhere."""
        self._place.unlink(missing_ok=True)


def _scratch_file(output: Path, layer: int) -> Path:
    return output.with_name(f".{output.name}.after-{layer:03d}.safetensors")


def _batches(windows: Windows, compute: Compute) -> int:
    return math.ceil(len(windows) / compute.batch_size)


def _bar(words: str, windows: Windows, compute: Compute, done: set[int]) -> tqdm:
    """A bar that counts token ids, finished batches included."""
    there = sum(min(compute.batch_size, len(windows) - b * compute.batch_size) for b in done)
    return progress(
        total=windows.ids.numel(), description=words, unit="tok", initial=there * windows.seqlen, unit_scale=True
    )


def _running_ppl(scores: Mapping[int, WindowScores], predicted_per_window: int) -> float:
    mean = sum(float(s.nll.sum()) for s in scores.values()) / (
        sum(len(s.nll) for s in scores.values()) * predicted_per_window
    )
    return math.exp(min(mean, 700.0))


def _listed(scores: WindowScores) -> dict:
    return {name: None if column is None else column.tolist() for name, column in vars(scores).items()}


def _scores(entry: Mapping, windows: int, taught: bool) -> WindowScores | None:
    """The scores of a journal's entry; None if they are not those of so many windows, all of them numbers."""
    columns = {}
    for name, there in (("nll", True), ("correct", True), ("kl", taught), ("agree", taught)):
        values = entry.get(name)
        if not there:
            columns[name] = None
        elif isinstance(values, list) and len(values) == windows and all(type(v) is float for v in values):
            columns[name] = np.array(values, dtype=np.float64)
        else:
            return None
    scores = WindowScores(**columns)
    return scores if scores.first_not_finite() is None else None
