"""Perplexity of stages in one process: a tree of segments, in which layers that stages share are run once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

from mistral_prune_lora.checkpoints.pruning_identity import KEY
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.evaluation.result import StageResult, stage_result
from mistral_prune_lora.evaluation.scoring import DenseAnswers, Scoring
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.layout.segments import Segment, segment_tree, shared_segments
from mistral_prune_lora.models.window_scores import head_bytes
from mistral_prune_lora.storage.activations import open_finished
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.memory import resident_groups
from mistral_prune_lora.streaming.passage import Origin, Passage, embedding_bytes
from mistral_prune_lora.streaming.record import RunRecord
from mistral_prune_lora.streaming.run import run_layers, run_to_file
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows


def evaluate_stages(
    subject: Subject,
    stages: Sequence[str],
    windows: Windows,
    compute: Compute,
    *,
    work_dir: str | Path,
    dense: DenseAnswers | None = None,
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
        dense: the dense model's answers, for KL and top-1 agreement.
        final_hidden: keep the final hidden states of the last stage here.
        keep_parts: keep activations wherever the layers of another part begin, and not only where stages part: disk
            space for a later evaluation with another bundle.

    Raises:
        LayoutError: a stage needs a bundle that is not given. Others as `jobs.score_stage`.
    """
    wanted, doubts = stages_of(subject, stages), warn_of(subject.model, windows)
    staged = {stage: subject.at(stage) for stage in wanted}
    passages = {stage: Passage(there.model, windows, compute) for stage, there in staged.items()}
    tree = _tree(subject, wanted)
    boundaries = _Boundaries(passages, staged, tree, Path(work_dir), keep_parts)
    for stage in wanted:
        parent, tail = _tail(tree, boundaries.kept, stage)
        sources, passage = staged[stage].sources(tail), passages[stage]
        run, words = boundaries.record(parent, stage).after(sources, compute), f"stage {stage}"
        journal = Path(work_dir) / f"{run.sha256[:24]}.{'kl' if dense else 'plain'}.scores"
        final = final_hidden if stage == wanted[-1] else None
        with Scoring(passage, journal, run, words, dense=dense, final_hidden=final) as scoring:
            if not scoring.is_complete:
                run_layers(passage, boundaries.origin(parent, stage), sources, scoring)
            scores = scoring.finish()
        about = {"stage": stage, "label": subject.label(stage), KEY: subject.pruning_identity}
        yield stage_result(about, scoring.record, scores, passage, doubts)


class _Boundaries:
    """The boundary activations at the ends of shared segments, each computed when it is first asked for.

    Attributes:
        kept: the segments whose activations are kept, by name.
    """

    def __init__(
        self,
        passages: Mapping[str, Passage],
        staged: Mapping[str, Subject],
        tree: Sequence[Segment],
        folder: Path,
        keep_parts: bool,
    ) -> None:
        """Look at what is there.

        Args:
            passages, staged: by stage; where stages share a segment, they have the same weights there.
            tree, folder, keep_parts: as for `evaluate_stages`.
        """
        self._passages, self._staged, self._tree = passages, staged, tree
        self._records: dict[str, RunRecord] = {}
        for segment in tree:
            stage = segment.through[0]
            sources, compute = staged[stage].sources(segment.layers), passages[stage].compute
            self._records[segment.name] = self.record(segment.parent, stage).after(sources, compute)
        self._files = {name: folder / f"{record.sha256[:24]}.safetensors" for name, record in self._records.items()}
        # What an earlier evaluation has left is started from, whether this one would keep it or not.
        self._there = {name for name, file in self._files.items() if open_finished(file, self._records[name].content())}
        self.kept = _kept(tree, keep_parts, self._there)

    def record(self, name: str | None, stage: str) -> RunRecord:
        """Of the run to the end of a segment of a stage; None: of the token ids."""
        if name is not None:
            return self._records[name]
        passage = self._passages[stage]
        return RunRecord.start(passage.model, passage.windows, passage.compute.dtype)

    def origin(self, name: str | None, stage: str) -> Origin:
        """The activations at the end of a kept segment, computed now if they are not there; None: the token ids."""
        passage = self._passages[stage]
        if name is None:
            return passage.origin(None)
        if name not in self._there:
            start, layers = _way(self._tree, self.kept, self.kept[name])
            run_to_file(passage, self.origin(start, stage), self._staged[stage].sources(layers), self._files[name])
            self._there.add(name)
        return passage.origin(self._files[name])


def _tree(subject: Subject, stages: Sequence[str]) -> list[Segment]:
    return segment_tree(subject.layout, stages, {stage: subject.original_layers(stage) for stage in stages})


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
        subject.at(stage).sources(subject.layout.active(stage))
    return wanted


def boundary_bytes(
    subject: Subject,
    stages: Sequence[str],
    windows: Windows,
    compute: Compute,
    *,
    dense: DenseAnswers | None = None,
    keep_parts: bool = False,
) -> int:
    """The most disk space that boundary activations of `evaluate_stages` take at any time.

    Raises:
        PipelineError: memory does not suffice for one layer; known here before anything is computed.
    """
    wanted, passage = stages_of(subject, stages), Passage(subject.model, windows, compute)
    tree = _tree(subject, wanted)
    kept = _kept(tree, keep_parts)
    heads = sum(head_bytes(model, compute.dtype) for model in [subject.model, *([dense.model] if dense else [])])
    # Between two groups of layers lies a file, which lives until the next one is there; the last group's is counted
    # already or, where it is scored, is none. Tails first: they need the most memory, so an error that names what they
    # need names enough for all.
    runs = [(*_tail(tree, kept, stage), heads, 2) for stage in wanted]
    runs += [(*_way(tree, kept, segment), 0, 1) for segment in kept.values()]
    extra = 0
    for parent, layers, reserved, files in runs:
        reserved += 0 if parent else embedding_bytes(subject.model, compute)
        groups = resident_groups(subject.sources(layers), compute, passage.config, windows.seqlen, reserved)
        extra = max(extra, min(len(groups) - 1, files))
    return (len(kept) + extra) * passage.nbytes


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
