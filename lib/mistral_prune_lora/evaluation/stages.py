"""Perplexity of stages from a tree of segments: every run of layers that stages share is computed once.

Two faces of one engine. `run_segment` and `score_stage` are jobs of their own in the workflow, with boundary
activations as files between them. `evaluate_stages` does all of it in one process, in a folder that survives a kill.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.pruning_identity import KEY, check_same_pruning
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.errors import LayoutError, NumberError
from mistral_prune_lora.evaluation.perplexity import head_bytes
from mistral_prune_lora.evaluation.runs import Scoring, Start, Teacher, run_to_file
from mistral_prune_lora.evaluation.subject import Subject, extend_record, start_record
from mistral_prune_lora.layout.partition import STAGES, Segment, segment_tree, shared_segments
from mistral_prune_lora.models.load import model_config
from mistral_prune_lora.provenance import record_sha256
from mistral_prune_lora.results.statistics import WindowScores, summarise
from mistral_prune_lora.storage.activations import open_finished
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.transaction import atomic_file
from mistral_prune_lora.streaming.layers import Compute, LayerSource, embedding_bytes, resident_groups
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import PROTOCOL, Windows


@dataclass(frozen=True)
class StageResult:
    """One stage, measured.

    Attributes:
        record: the result with everything that identifies it, ready for JSON.
        scores: of every window.
    """

    record: dict
    scores: WindowScores

    def save(self, result_json: str | Path, window_parquet: str | Path | None = None) -> None:
        """Write the record as JSON and the windows' scores as parquet; each whole or not at all."""
        if window_parquet is not None:
            self.scores.save(window_parquet, self.record["seqlen"] - 1)
        with atomic_file(result_json) as fresh:
            write_json(fresh, self.record)


def run_segment(
    *,
    model_dir: str | Path,
    weights_dir: str | Path,
    layers: Sequence[int],
    windows: str | Path,
    source: str | Path | None,
    output: str | Path,
    dtype: str,
    device: str = "auto",
    batch_size: int = 1,
    max_memory: int | None = None,
) -> None:
    """Run windows through the layers of one segment and keep the boundary activations at its end.

    A killed run is continued from its last finished batch, with the bits of an undisturbed one.

    Args:
        model_dir: the A model, merged A or dense model: configuration, and embedding if `source` is None.
        weights_dir: the model or bundle that holds the layers.
        layers: original indices, ascending.
        windows: a file of windows.
        source: the parent segment's activations; None starts from the token ids.
        output: safetensors with "hidden_states", shape (windows, seqlen, hidden), in the compute dtype.
        dtype: "bf16", "fp16" or "fp32", of weights and activations.
        device: as for `device.resolve_device`.
        batch_size: windows that go through a layer together.
        max_memory: bytes to use on the device; None means a share of what is free.

    Raises:
        DataError: `windows` or `source` is not what it should be, or `source` was made of other windows.
        CheckpointError, LayoutError: weights are missing or do not fit, or are of another pruning than the model.
        NumberError: weights or hidden states hold NaN or infinity.
        PipelineError: memory or disk space does not suffice, or another process is writing `output`.
    """
    compute = Compute(resolve_device(device), COMPUTE_DTYPES[dtype], batch_size, max_memory)
    model, holder = open_checkpoint(model_dir), _open_weights(model_dir, weights_dir)
    check_same_pruning([model.path, holder.path])
    cut = Windows.load(windows)
    config = model_config(model)
    print(f"boundary activations: {hidden_bytes(model, cut, compute.dtype) / 1e6:.1f} MB in {output}", file=sys.stderr)
    start = Start(model, cut, compute, source or None)
    run_to_file(start, [LayerSource(i, holder) for i in layers], cut, config, compute, Path(output))


def score_stage(
    *,
    stage: str,
    model_dir: str | Path,
    weights_dir: str | Path,
    layers: Sequence[int],
    windows: str | Path,
    source: str | Path | None,
    result_json: str | Path,
    window_parquet: str | Path,
    dtype: str,
    device: str = "auto",
    batch_size: int = 1,
    max_memory: int | None = None,
    final_hidden: str | Path | None = None,
    teacher_hidden: str | Path | None = None,
    dense_dir: str | Path | None = None,
    names: Mapping[str, str] | None = None,
) -> StageResult:
    """Run a stage's tail from its last boundary activations, and score every window.

    Args:
        stage: "A", "AB" or "FULL"; a dense model is "FULL".
        model_dir: the A model, merged A or dense model: configuration, norm and head.
        weights_dir: the model or bundle that holds the tail.
        layers: the tail's original indices; empty if the stage ends where `source` ends.
        windows, source, dtype, device, batch_size, max_memory: as for `run_segment`.
        result_json: the result, see `StageResult`.
        window_parquet: NLL and the rest, a row a window.
        final_hidden: also keep the final hidden states (before the norm) in this file, for others to compare with.
        teacher_hidden, dense_dir: the dense model's final hidden states and its directory; both or neither.
        names: added to the result: experiment, dataset, variant, whatever the caller calls it.

    Raises:
        As `run_segment`. NumberError also for a score or perplexity that is no number; nothing is written then.
    """
    compute = Compute(resolve_device(device), COMPUTE_DTYPES[dtype], batch_size, max_memory)
    subject, holder = Subject.open(model_dir), _open_weights(model_dir, weights_dir)
    identity = check_same_pruning([subject.model.path, holder.path])
    teacher = Teacher(open_checkpoint(dense_dir), Path(teacher_hidden)) if teacher_hidden and dense_dir else None
    cut = Windows.load(windows)
    doubts = warn_of(subject.model, cut)
    job = Scoring(subject.model, cut, compute, _beside(result_json, "scores"), teacher, final_hidden or None)
    start = Start(subject.model, cut, compute, source or None)
    record, scores = job.run(start, [LayerSource(i, holder) for i in layers], f"stage {stage}")
    about = {"stage": stage, "label": subject.label(stage), KEY: identity}
    result = _result({**(names or {}), **about}, record, scores, cut, compute, doubts)
    result.save(result_json, window_parquet)
    job.forget()
    return result


def evaluate_stages(
    subject: Subject,
    stages: Sequence[str],
    windows: Windows,
    compute: Compute,
    *,
    work_dir: str | Path,
    teacher: Teacher | None = None,
    final_hidden: str | Path | None = None,
    keep_parts: bool = False,
) -> Iterator[StageResult]:
    """Evaluate stages in one process, each shared segment once; yields each result as soon as it is there.

    Everything finished stays in `work_dir` under names that follow from weights, token ids, dtype, batch size and
    versions. So a killed run is continued by the next one, and after a change of one bundle only what depends on it is
    computed. What lies there is believed as far as its checksums go: a file or an entry that is not what was written is
    made anew where that is seen before it is used, or ends the run. Deleting the folder is up to the caller.

    Args:
        subject: the model, and the bundles that the stages need.
        stages: of "A", "AB", "FULL"; yielded in this order. A dense model has one stage, whatever is asked for.
        windows: the token ids.
        compute: device, dtype, batch size, memory.
        work_dir: where boundary activations and unfinished scores go.
        teacher: the dense model's answers, for KL and top-1 agreement.
        final_hidden: keep the final hidden states of the last stage here.
        keep_parts: keep activations wherever the layers of another part begin, and not only where stages part: disk
            space for a later evaluation with another bundle.

    Raises:
        LayoutError: a stage needs a bundle that is not given. Others as `score_stage`.
    """
    wanted, doubts = stages_of(subject, stages), warn_of(subject.model, windows)
    tree = segment_tree(subject.layout, wanted)
    sources = {segment.name: subject.sources(segment.layers) for segment in tree}
    config, folder = model_config(subject.model), Path(work_dir)
    records: dict[str | None, dict] = {None: start_record(subject.model, windows, compute.dtype)}
    for segment in tree:
        records[segment.name] = extend_record(records[segment.parent], sources[segment.name], compute)
    files = {name: folder / f"{record_sha256(record)[:24]}.safetensors" for name, record in records.items() if name}
    # What an earlier evaluation has left is started from, whether this one would keep it or not.
    there = {name for name, file in files.items() if open_finished(file, records[name])}
    kept = _kept(tree, keep_parts, there)

    def boundary(name: str | None) -> Start:
        """The activations at the end of a shared segment, computed now if they are not there."""
        if name is None:
            return Start(subject.model, windows, compute, None)
        if name not in there:
            start, layers = _way(tree, kept, kept[name])
            run_to_file(boundary(start), subject.sources(layers), windows, config, compute, files[name])
            there.add(name)
        return Start(subject.model, windows, compute, files[name])

    for stage in wanted:
        parent, tail = _tail(tree, kept, stage)
        tail_sources = subject.sources(tail)
        record = extend_record(records[parent], tail_sources, compute)
        final = final_hidden if stage == wanted[-1] else None
        place = folder / f"{record_sha256(record)[:24]}.{'kl' if teacher else 'plain'}.scores"
        job = Scoring(subject.model, windows, compute, place, teacher, final)
        record, scores = job.run(lambda parent=parent: boundary(parent), tail_sources, f"stage {stage}", record)
        about = {"stage": stage, "label": subject.label(stage), KEY: subject.pruning_identity}
        yield _result(about, record, scores, windows, compute, doubts)


def stages_of(subject: Subject, stages: Sequence[str]) -> list[str]:
    """The stages to measure, in the guide's order; a dense model has one, FULL.

    Raises:
        LayoutError: there is no such stage, or a bundle that it needs is not given.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise LayoutError(f"there is no stage {unknown}", where="--stages", mend=f"Use some of {', '.join(STAGES)}")
    wanted = ["FULL"] if subject.is_dense else [stage for stage in STAGES if stage in stages]
    for stage in wanted:
        subject.sources(subject.layout.active(stage))
    return wanted


def boundary_bytes(
    subject: Subject,
    stages: Sequence[str],
    windows: Windows,
    compute: Compute,
    *,
    teacher: Teacher | None = None,
    keep_parts: bool = False,
) -> int:
    """The most disk space that boundary activations of `evaluate_stages` take at any time.

    Raises:
        PipelineError: memory does not suffice for one layer; known here before anything is computed.
    """
    wanted = stages_of(subject, stages)
    tree, config = segment_tree(subject.layout, wanted), model_config(subject.model)
    kept = _kept(tree, keep_parts)
    heads = sum(head_bytes(model, compute.dtype) for model in [subject.model, *([teacher.model] if teacher else [])])
    # Between two groups of layers lies a file, which lives until the next one is there; the last group's is counted
    # already or, where it is scored, is none. Tails first: they need the most memory, so an error that names what they
    # need names enough for all.
    runs = [(*_tail(tree, kept, stage), heads, 2) for stage in wanted]
    runs += [(*_way(tree, kept, segment), 0, 1) for segment in kept.values()]
    extra = 0
    for parent, layers, reserved, files in runs:
        reserved += 0 if parent else embedding_bytes(subject.model, compute)
        groups = resident_groups(subject.sources(layers), compute, config, windows.seqlen, reserved)
        extra = max(extra, min(len(groups) - 1, files))
    return (len(kept) + extra) * hidden_bytes(subject.model, windows, compute.dtype)


def _kept(tree: Sequence[Segment], keep_parts: bool, there: Set[str] = frozenset()) -> dict[str, Segment]:
    """The segments to start others from: where stages part; where parts meet, if asked; and those that are there."""
    shared = shared_segments(tree)
    return {s.name: s for s in shared if keep_parts or len(s.through) > 1 or s.name in there}


def _tail(tree: Sequence[Segment], kept: Mapping[str, Segment], stage: str) -> tuple[str | None, tuple[int, ...]]:
    """What is left to run for a stage: the last kept segment on its way (None: the embedding), the layers after it."""
    end = next(segment for segment in tree if stage in segment.ends)
    if end.name in kept:
        return end.name, ()
    return _way(tree, kept, end)


def _way(tree: Sequence[Segment], kept: Mapping[str, Segment], end: Segment) -> tuple[str | None, tuple[int, ...]]:
    """The last kept segment before `end`, and the layers from there to its end."""
    by_name, layers, parent = {segment.name: segment for segment in tree}, end.layers, end.parent
    while parent is not None and parent not in kept:
        layers = by_name[parent].layers + layers
        parent = by_name[parent].parent
    return parent, layers


def hidden_bytes(model: Checkpoint, windows: Windows, dtype: torch.dtype) -> int:
    """The size of all windows' hidden states at one place in the model."""
    return windows.ids.numel() * model_config(model).hidden_size * dtype.itemsize


def _result(
    about: Mapping[str, str | None],
    record: dict,
    scores: WindowScores,
    windows: Windows,
    compute: Compute,
    doubts: Sequence[str],
) -> StageResult:
    """Everything that a number needs in order to be compared with another."""
    told = windows.identity
    try:
        numbers = summarise(
            scores,
            predicted_per_window=windows.seqlen - 1,
            tokens_per_byte=windows.ids.numel() / told.utf8_bytes if told.utf8_bytes else None,
        )
    except NumberError as error:
        raise NumberError(error.what, where=about["label"], mend=error.mend) from None
    weights = record["weights"]
    return StageResult(
        {
            **about,
            "active_layers": len(record["layers"]),
            "parameters": record["parameters"],
            **numbers,
            "seqlen": windows.seqlen,
            "dtype": record["dtype"],
            "device": str(compute.device),
            "batch_size": compute.batch_size,
            "protocol": PROTOCOL,
            "text": {
                "dataset": told.dataset,
                "split": told.split,
                "source": told.source,
                "sha256": told.text_sha256,
                "utf8_bytes_covered": told.utf8_bytes,
                "windows_available": told.text_windows,
            },
            "ids_sha256": told.ids_sha256,
            "tokenizer": {"name": told.tokenizer, "sha256": told.tokenizer_sha256},
            "steps": record["steps"],
            "weights_sha256": record_sha256(weights),
            "weights": weights,
            **({"dense_sha256": record["dense"]} if "dense" in record else {}),
            "warnings": list(doubts),
        },
        scores,
    )


def _beside(path: str | Path, suffix: str) -> Path:
    return Path(path).with_name(f".{Path(path).name}.{suffix}")


def _open_weights(model_dir: str | Path, weights_dir: str | Path) -> Checkpoint:
    return open_checkpoint(weights_dir or model_dir)
