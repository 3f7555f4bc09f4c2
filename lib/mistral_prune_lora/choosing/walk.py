"""All candidates on their way through the model: layer by layer, every branch through a layer while it is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from tqdm import tqdm

from mistral_prune_lora.choosing.tree import START, Tree
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import LayerSource
from mistral_prune_lora.streaming.passage import Origin, Passage

Tap = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Walk:
    """Some batches of windows through a tree of layers.

    Attributes:
        passage: the windows, and how they are run.
        origin: the token ids.
        backbone: in which the layers come and go.
        tree: of the candidates. The first of them is the dense model.
        tap: called for each batch and layer of the dense model with the batch's number, what enters and what leaves.
    """

    passage: Passage
    origin: Origin
    backbone: Backbone
    tree: Tree
    tap: Tap | None = None

    def ends(self, batches: Iterable[int], bar: tqdm) -> dict[int, list[torch.Tensor]]:
        """What leaves the last layer of each candidate, for each batch: on the CPU, shape (n, seqlen, hidden).

        Each node's hidden states lie in memory until the last layer that starts from them, `Tree.most_alive` nodes at
        the most.
        """
        tree, batches = self.tree, list(batches)
        held = {(START, batch): self._entering(batch) for batch in batches}
        layers = [[LayerSource(layer, self.passage.model)] for layer in tree.by_layer]
        for (source,) in self.backbone.resident(layers):
            for number in tree.by_layer[source.index]:
                for batch in batches:
                    held[number, batch] = self._run(number, batch, held)
                    bar.update(held[number, batch].shape[0] * held[number, batch].shape[1])
        return {batch: [held[end, batch] for end in tree.ends] for batch in batches}

    def _entering(self, batch: int) -> torch.Tensor:
        span = self.passage.windows_of(batch)
        return self.origin.read(span.start, span.stop)

    def _run(self, number: int, batch: int, held: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
        """One batch through one node's layer; lets go of what nobody starts from any more."""
        tree, parent = self.tree, self.tree.nodes[number].parent
        over = tree.last_child[parent] == number and parent not in tree.ends
        entering = held.pop((parent, batch)) if over else held[parent, batch]
        entering = entering.to(self.passage.compute.device)
        leaving = self.backbone(entering)
        if self.tap and number in self._dense:
            self.tap(batch, entering, leaving)
        return leaving.cpu()

    @cached_property
    def _dense(self) -> frozenset[int]:
        return self.tree.way(self.tree.ends[0])
