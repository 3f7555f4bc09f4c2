"""Which layer belongs to A, B or C, and which layers a stage runs.

Imports neither torch nor Snakemake, so the Snakefile can ask it for every target while the DAG is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mistral_prune_lora.errors import LayoutError

STAGES = ("A", "AB", "FULL")
MOST_LAYERS = 10_000  # of a dense model; the largest ones have some hundreds
PARTS_OF_STAGE = {"A": ("A",), "AB": ("A", "B"), "FULL": ("A", "B", "C")}


@dataclass(frozen=True)
class Layout:
    """The partition of a dense model's layers into kept layers (A) and the bundles B and C.

    An old manifest may say what A drops and not which of it is B's and which C's. A can then be merged and measured;
    asking for B or C is an error until the bundles have told (see `assigned`), never an empty answer.

    Attributes:
        num_layers: layers of the dense model.
        b, c: the original indices in each bundle, ascending. Everything else is kept by A.
        unassigned: dropped layers of which it is not known whether they are B's or C's, ascending; b and c are then
            empty.

    Raises:
        LayoutError: an index out of range, twice, or in both bundles; nothing kept.
    """

    num_layers: int
    b: tuple[int, ...] = ()
    c: tuple[int, ...] = ()
    unassigned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("b", "c", "unassigned"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        if self.num_layers > MOST_LAYERS:
            raise LayoutError(f"the model has {self.num_layers} layers, and {MOST_LAYERS} are the most that are taken")
        dropped = self.dropped
        outside = [i for i in dropped if not 0 <= i < self.num_layers]
        if outside:
            raise LayoutError(
                f"layers {outside} do not exist in a model of {self.num_layers} layers",
                mend=f"choose indices from 0 to {self.num_layers - 1}",
            )
        twice = sorted(i for i, times in Counter(dropped).items() if times > 1)
        if twice:
            raise LayoutError(f"layers {twice} stand more than once in B and C", mend="name each dropped layer once")
        if not self.kept:
            raise LayoutError("every layer is dropped", mend="keep at least one layer in A")

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers A runs without: B's and C's."""
        return tuple(sorted(self.b + self.c + self.unassigned))

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers whose weights A holds."""
        gone = set(self.dropped)
        return tuple(i for i in range(self.num_layers) if i not in gone)

    def layers_of(self, part: str) -> tuple[int, ...]:
        """The layers that part "A", "B" or "C" holds the weights of; LayoutError if nothing says so."""
        if part != "A" and self.unassigned:
            raise LayoutError(
                f"layers {list(self.unassigned)} are dropped, and nothing says which of them are B's and which C's",
                where="manifest.json",
                mend="give the bundles, or write stages.B.removed_layers and stages.C.removed_layers into the manifest",
            )
        return {"A": self.kept, "B": self.b, "C": self.c}[part]

    def part_of(self, layer: int) -> str:
        """The part ("A", "B" or "C") that holds a layer's weights; LayoutError if nothing says so."""
        if layer in self.unassigned:
            self.layers_of("B")
        return "B" if layer in self.b else "C" if layer in self.c else "A"

    def active(self, stage: str) -> tuple[int, ...]:
        """The layers that stage "A", "AB" or "FULL" goes through, ascending; LayoutError if nothing says so."""
        return tuple(sorted(i for part in PARTS_OF_STAGE[stage] for i in self.layers_of(part)))

    def assigned(self, bundles: Mapping[str, Sequence[int]], where: str | Path | None = None) -> Layout:
        """The same layers with B and C told by what they hold; of one bundle, since the rest is the other's.

        Args:
            bundles: layers by part, "B" and "C", either or both. Nothing is asked of them where B and C are known.
            where: what says so, for the error.

        Raises:
            LayoutError: they are not the layers that A drops.
        """
        if not self.unassigned or not bundles:
            return self
        held = {part: tuple(layers) for part, layers in bundles.items()}
        rest = tuple(i for i in self.unassigned if not any(i in layers for layers in held.values()))
        b, c = (held.get(part, rest) for part in "BC")
        if sorted(b + c) != list(self.unassigned):
            told = " and ".join(f"{part} holds {sorted(layers)}" for part, layers in sorted(held.items()))
            raise LayoutError(
                f"A drops layers {list(self.unassigned)}, but {told}",
                where=where,
                mend="use the A model and the bundles of one pruning",
            )
        return replace(self, b=b, c=c, unassigned=())

    def without(self, restored: Sequence[int]) -> Layout:
        """The layout after some dropped layers have become layers of A again."""
        parts = (self.b, self.c, self.unassigned)
        return Layout(self.num_layers, *(tuple(i for i in part if i not in restored) for part in parts))


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


def segment_tree(layout: Layout, stages: Sequence[str] = STAGES) -> list[Segment]:
    """The tree of segments that serves `stages` with every shared run of layers computed once; parents come first.

    The stages' layer sequences are put into a prefix tree, whose unbranched runs within one part are the segments.
    For Mistral-7B with B 21-24 and C 25-28: 21 + 3, 4 + 3 and 4 + 3 layers, 38 in all, where 84 run one by one.
    """
    paths = {stage: layout.active(stage) for stage in stages}
    segments: list[Segment] = []

    def grow(start: int, through: tuple[str, ...], parent: str | None) -> None:
        """Add the segments of the stages `through`, which agree on their first `start` layers."""
        path, end = paths[through[0]], start
        while _goes_on(layout, [paths[s] for s in through], start, end):
            end += 1
        node = parent
        if end > start:
            node = _segment_name(layout, path[:end], start)
            ends = tuple(s for s in through if len(paths[s]) == end)
            segments.append(Segment(node, layout.part_of(path[start]), path[start:end], parent, through, ends))
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


def _goes_on(layout: Layout, paths: list[tuple[int, ...]], start: int, end: int) -> bool:
    """Whether a segment from position `start` can take in position `end`: no path ends, forks or changes part."""
    if any(len(path) == end for path in paths) or len({path[end] for path in paths}) != 1:
        return False
    return end == start or layout.part_of(paths[0][end]) == layout.part_of(paths[0][start])


def _segment_name(layout: Layout, prefix: tuple[int, ...], start: int) -> str:
    """The segment's own layers and the smallest of all stages that reaches it by the same way, asked for or not."""
    stage = next(s for s in STAGES if layout.active(s)[: len(prefix)] == prefix)
    return f"{layout.part_of(prefix[start])}{prefix[start]:03d}-{prefix[-1]:03d}_{stage}"
