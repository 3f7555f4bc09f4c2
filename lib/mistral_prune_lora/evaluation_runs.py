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

from mistral_prune_lora.activations import ActivationReader, ActivationWriter, Journal
from mistral_prune_lora.checkpoint import Checkpoint
from mistral_prune_lora.console import progress
from mistral_prune_lora.evaluation_subject import (
    check_continues,
    extend_record,
    outside_entries,
    record_digest,
    start_record,
    tensors_digest,
)
from mistral_prune_lora.layers import (
    Backbone,
    Compute,
    DelayedStore,
    Embedding,
    LayerSource,
    embedding_bytes,
    resident_groups,
    stream_batches,
)
from mistral_prune_lora.model import head_name, model_config
from mistral_prune_lora.perplexity import Head, score_batch
from mistral_prune_lora.statistics import WindowScores
from mistral_prune_lora.windows import Windows


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
            check_continues(reader.run, model, windows, compute, reader.path)
            self.record, self.read = reader.run, reader.read

    def _embed(self, first: int, last: int) -> torch.Tensor:
        self._embedding = self._embedding or Embedding(self._model, self._dtype)
        return self._embedding(self._windows.ids[first:last])


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
    record, read, reserved = start.record, start.read, start.nbytes
    # A killed run may have come some groups far, whatever memory it had.
    for number in reversed(range(1, len(sources))):
        file = _scratch_file(output, sources[number - 1].index)
        if file.is_file():
            reader = ActivationReader(file)
            if reader.run == extend_record(start.record, sources[:number], compute):
                scratch, remaining, record, read, reserved = file, sources[number:], reader.run, reader.read, 0
                break
    groups = resident_groups(remaining, compute, config, windows.seqlen, reserved)
    backbone = Backbone(config, compute)
    for group in backbone.resident(groups):
        last = ending if group is groups[-1] else None
        target = output if group is groups[-1] else _scratch_file(output, group[-1].index)
        record = last.record if last else extend_record(record, group, compute)
        with (
            ActivationWriter(target, shape, compute.dtype, compute.batch_size, record) as writer,
            _bar(f"layers {group[0].index}-{group[-1].index}", windows, compute, writer.done) as bar,
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
        scratch = target
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
            check_continues(teacher.run, self._teacher.model, self._windows, self._compute, teacher.path)
            record = {**record, "dense": self._teacher_record(teacher)}
        with ExitStack() as held:
            journal = held.enter_context(Journal(self._place, {"run": record}))
            scores = {entry["batch"]: _scores(entry) for entry in journal.entries}
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

    def _final_writer(self, record: dict) -> ActivationWriter | None:
        if self._final is None or (self._final.is_file() and ActivationReader(self._final).run == record):
            return None
        shape = (*self._windows.ids.shape, self._config.hidden_size)
        return ActivationWriter(self._final, shape, self._compute.dtype, self._compute.batch_size, record)

    def _compute_missing(self, wanted, start, tail, words, journal, scores, writer, teacher) -> None:
        windows, compute = self._windows, self._compute
        heads = [Head(self._model, compute.dtype, compute.device)]
        if teacher:
            heads.append(Head(self._teacher.model, compute.dtype, compute.device))
        reserved = sum(head.nbytes for head in heads) + start.nbytes
        *earlier, last = resident_groups(tail, compute, self._config, windows.seqlen, reserved) or [[]]
        scratch = self._place.with_suffix(".tail.safetensors")
        if earlier:
            before = [source for group in earlier for source in group]
            reached = extend_record(start.record, before, compute)
            if not (scratch.is_file() and ActivationReader(scratch).run == reached):
                run_to_file(start, before, windows, self._config, compute, scratch)
            start = Start(self._model, windows, compute, scratch)
        backbone = Backbone(self._config, compute)
        for _ in backbone.resident([last]):
            done = set(range(_batches(windows, compute))) - set(wanted)
            with _bar(words, windows, compute, done) as bar:
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
                        journal.append({"batch": batch, **_listed(scores[batch])})
                    bar.set_postfix_str(f"ppl {_running_ppl(scores, windows.seqlen - 1):.4f}", refresh=False)
                    bar.update(hidden.shape[0] * hidden.shape[1])
                if store:
                    store.flush()
        scratch.unlink(missing_ok=True)

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
        return record_digest({"hidden": teacher.run, "head": head, "projection": tied})

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


def _scores(entry: Mapping) -> WindowScores:
    columns = {name: entry[name] for name in ("nll", "correct", "kl", "agree")}
    return WindowScores(**{n: None if v is None else np.array(v, dtype=np.float64) for n, v in columns.items()})
