"""What a choice is asked for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mistral_prune_lora.choosing.candidates import (
    Missing,
    blocks,
    check_drop,
    check_splits,
    one_more,
    running,
    splits,
)
from mistral_prune_lora.choosing.tree import Tree

METHODS = ("blocks", "greedy")
SPLITS = ("contiguous", "all", "none")


@dataclass(frozen=True)
class ChoiceSettings:
    """What is chosen from, and how.

    Attributes:
        drop: layers to drop.
        keep_last_layer: never drop the last one.
        method: "blocks" measures every block of consecutive layers; "greedy" drops one layer after the other, each
            time the one without which the damage is least, consecutive or not.
        race: windows after which candidates surely worse than the best are dropped, again and again; None drops none.
        splits: how B and C are chosen: "contiguous" measures B at either end of the dropped layers, "all" every choice
            of B, "none" gives B the lower half unmeasured.
        b_sizes: layers of B to try; the first of them is chosen from, the others are told beside it. Empty takes half
            of them, the smaller half of an odd number.
    """

    drop: int
    keep_last_layer: bool = True
    method: str = "blocks"
    race: int | None = None
    splits: str = "contiguous"
    b_sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, told: Mapping) -> ChoiceSettings:
        """Those of a configuration's section `choose`, which has further keys."""
        wanted: dict[str, Any] = {field.name: told[field.name] for field in fields(cls)}
        return cls(**wanted | {"b_sizes": tuple(told["b_sizes"])})

    def sizes(self) -> tuple[int, ...]:
        """The sizes of B that are measured; none where nothing is."""
        if self.splits == "none" or self.drop < 2:
            return ()
        return self.b_sizes or (self.drop // 2,)

    def check(self, num_layers: int) -> None:
        """Raise a LayoutError unless a model of so many layers can be cut like that."""
        check_drop(num_layers, self.drop)
        check_splits(self.drop, self.b_sizes or self.sizes(), every=self.splits == "all")

    def amount(self, num_layers: int) -> Amount:
        """What measuring comes to in a model of so many layers, without a race; for a greedy choice and for splits,
        which go by what is found, that of the first layers.

        Raises:
            LayoutError: as `check`.
        """
        self.check(num_layers)
        dropped = tuple(range(self.drop))
        if self.method == "greedy":
            steps = [one_more(num_layers, dropped[:n], keep_last_layer=self.keep_last_layer) for n in range(self.drop)]
        else:
            steps = [blocks(num_layers, self.drop, keep_last_layer=self.keep_last_layer)]
        if self.sizes():
            steps.append([c for _, c in splits(dropped, self.sizes(), every=self.splits == "all")])
        trees = [_tree(num_layers, step) for step in steps]
        return Amount(
            sum(tree.passes for tree in trees),
            sum(len(tree.ends) for tree in trees),
            max(len(tree.ends) for tree in trees),
            max(tree.most_alive for tree in trees),
        )


@dataclass(frozen=True)
class Amount:
    """What measuring candidates comes to.

    Attributes:
        passes: how many times a layer is run on all windows.
        scored: how many times windows are scored, the dense model's among them.
        most_ends: the most that are scored together.
        most_alive: the most hidden states of each window that are held between layers.
    """

    passes: int
    scored: int
    most_ends: int
    most_alive: int


def _tree(num_layers: int, candidates: Sequence[Missing]) -> Tree:
    return Tree.of([range(num_layers), *(running(num_layers, missing) for missing in candidates)])
