"""Which runs of layers stages share: the tree of segments in which each of them is run once.

Imports neither torch nor Snakemake, so the Snakefile can ask it for every target while the DAG is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from mistral_prune_lora.layout.partition import STAGES, Layout

_Way = tuple[tuple[int, bool], ...]  # a stage's layers, each with whether its original weights are put back


@dataclass(frozen=True)
class Segment:
    """A run of layers that the same stages go through and that lies in one part.

    The last condition is what makes a segment a unit of work: a new C adapter touches C's segments and what hangs on
    them, and no other.

    Attributes:
        name: unique within one tree, the same whichever stages are asked for: "A000-020_A", "A029-031_FULL".
        part: "A", "B" or "C", whose weights it needs.
        layers: original indices, ascending.
        parent: name of the segment whose boundary activations it starts from; None starts from the embedding.
        through: the stages that pass it.
        ends: the stages whose last layer it holds.
    """

    name: str
    part: str
    layers: tuple[int, ...]
    parent: str | None
    through: tuple[str, ...]
    ends: tuple[str, ...]


def segment_tree(
    layout: Layout, stages: Sequence[str] = STAGES, original: Mapping[str, Set[int]] | None = None
) -> list[Segment]:
    """The tree of segments that serves `stages` with every shared run of layers computed once; parents come first.

    The stages' layer sequences are put into a prefix tree, whose unbranched runs within one part are the segments.
    For Mistral-7B with B 21-24 and C 25-28: 21 + 3, 4 + 3 and 4 + 3 layers, 38 in all, where 84 run one by one.

    Args:
        layout: the layers of each part.
        stages: those that are asked for.
        original: of each stage, the layers whose original weights a bundle puts back: other layers than those of the
            same number in a stage that runs them as they were merged.
    """
    original = original or {}
    paths = {stage: _way(layout, stage, original) for stage in stages}
    segments: list[Segment] = []

    def grow(start: int, through: tuple[str, ...], parent: str | None) -> None:
        """Add the segments of the stages `through`, which agree on their first `start` layers."""
        path, end = paths[through[0]], start
        while _goes_on(layout, [paths[s] for s in through], start, end):
            end += 1
        node = parent
        if end > start:
            node = _segment_name(layout, path[:end], start, original)
            ends = tuple(s for s in through if len(paths[s]) == end)
            layers = tuple(layer for layer, _ in path[start:end])
            segments.append(Segment(node, layout.part_of(layers[0]), layers, parent, through, ends))
        for layer in sorted({paths[s][end] for s in through if len(paths[s]) > end}):
            grow(end, tuple(s for s in through if len(paths[s]) > end and paths[s][end] == layer), node)

    grow(0, tuple(stages), None)
    return segments


def stage_run(tree: Sequence[Segment], stage: str) -> tuple[str | None, Segment | None]:
    """What is left to run for one stage once every segment that others build on has been run.

    Returns:
        The segment whose boundary activations the stage starts from (None: from the embedding), and the tail that it
        runs by itself (None: the stage ends where that segment ends).
    """
    end = next(s for s in tree if stage in s.ends)
    return (end.name, None) if end in shared_segments(tree) else (end.parent, end)


def shared_segments(tree: Sequence[Segment]) -> list[Segment]:
    """The segments that others start from, whose boundary activations are worth keeping; parents come first."""
    parents = {s.parent for s in tree}
    return [s for s in tree if s.name in parents]


def _way(layout: Layout, stage: str, original: Mapping[str, Set[int]]) -> _Way:
    return tuple((layer, layer in original.get(stage, ())) for layer in layout.active(stage))


def _goes_on(layout: Layout, paths: list[_Way], start: int, end: int) -> bool:
    """Whether a segment from position `start` can take in position `end`: no path ends, forks or changes part."""
    if any(len(path) == end for path in paths) or len({path[end] for path in paths}) != 1:
        return False
    return end == start or layout.part_of(paths[0][end][0]) == layout.part_of(paths[0][start][0])


def _segment_name(layout: Layout, prefix: _Way, start: int, original: Mapping[str, Set[int]]) -> str:
    """The segment's own layers and the smallest of all stages that reaches it by the same way, asked for or not."""
    stage = next(s for s in STAGES if _way(layout, s, original)[: len(prefix)] == prefix)
    first, last = prefix[start][0], prefix[-1][0]
    return f"{layout.part_of(first)}{first:03d}-{last:03d}_{stage}"
