"""Which layer belongs to A, B or C, and which layers a stage goes through.

Imports neither torch nor Snakemake, so the Snakefile can ask it for every target while the DAG is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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


def spans(layers: Iterable[int], *, to: str = "-", then: str = ", ") -> str:
    """Layer numbers as people write them: "0-20, 29-31"; or with other signs between them."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return then.join(str(a) if a == b else f"{a}{to}{b}" for a, b in runs)
