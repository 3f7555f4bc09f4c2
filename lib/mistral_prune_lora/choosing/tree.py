"""Candidates as sequences of layers, and the tree of their shared beginnings. Imports no torch.

Every candidate runs some of the dense model's layers in their order. Those that begin with the same layers share what
leaves these, so that each distinct beginning is run once. The tree is walked layer by layer and not branch by branch:
all branches that go through a layer take it while its weights are in memory, and each layer is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

START = 0  # the node before any layer: the token ids' embeddings


@dataclass(frozen=True)
class Node:
    """What leaves one layer after a beginning.

    Attributes:
        parent: the node whose hidden states enter the layer.
        layer: original index; -1 of the start.
    """

    parent: int
    layer: int


@dataclass(frozen=True)
class Tree:
    """The tree of some sequences of layers.

    Attributes:
        nodes: the start, then one for each distinct beginning, by layer: the order in which they are run.
        ends: the node of each sequence's last layer.
    """

    nodes: tuple[Node, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Tree:
        """The tree of sequences of layers, each ascending and not empty.

        Raises:
            ValueError: a sequence is empty or not ascending.
        """
        if any(not path or list(path) != sorted(set(path)) for path in sequences):
            raise ValueError("a sequence of layers is ascending and not empty")
        beginnings = {tuple(path[:count]) for path in sequences for count in range(1, len(path) + 1)}
        ordered = [(), *sorted(beginnings, key=lambda path: (path[-1], path))]
        numbers = {path: number for number, path in enumerate(ordered)}
        nodes = [Node(START, -1), *(Node(numbers[path[:-1]], path[-1]) for path in ordered[1:])]
        return cls(tuple(nodes), tuple(numbers[tuple(path)] for path in sequences))

    @property
    def passes(self) -> int:
        """How many times a layer is run, over all nodes."""
        return len(self.nodes) - 1

    @cached_property
    def by_layer(self) -> dict[int, list[int]]:
        """The nodes of each layer that is run, ascending."""
        found: dict[int, list[int]] = {}
        for number, node in enumerate(self.nodes[1:], 1):
            found.setdefault(node.layer, []).append(number)
        return found

    @cached_property
    def last_child(self) -> dict[int, int]:
        """The last node that starts from each node; after it, only an end is needed any more."""
        return {node.parent: number for number, node in enumerate(self.nodes[1:], 1)}

    @cached_property
    def most_alive(self) -> int:
        """The most nodes whose hidden states are held at once: those that others still start from, and ends."""
        ends, alive, most = set(self.ends), {START}, 1
        for number, node in enumerate(self.nodes[1:], 1):
            alive.add(number)
            if self.last_child[node.parent] == number and node.parent not in ends:
                alive.discard(node.parent)
            most = max(most, len(alive))
        return most

    def way(self, end: int) -> frozenset[int]:
        """The nodes on the way to one of them, itself among them, the start not."""
        found = set()
        while end != START:
            found.add(end)
            end = self.nodes[end].parent
        return frozenset(found)
