"""One student at several stages in one step: layers that stages share are run once, forward and backward.

The stages' layers make the tree of segments that an evaluation runs (layout.segments). Each segment goes through the
model's own decoder with PassLayers in the places of all other layers, so that positions and attention masks are made by
the code that makes them in the whole model; autograd sums what comes back where the stages part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.layout.segments import Segment, segment_tree
from mistral_prune_lora.models.pass_layer import PassLayer


class StagedDecoder:
    """A decoder with the layers of all parts, run at some of its stages.

    Attributes:
        layer_passes: decoder layers that one call runs.
    """

    def __init__(self, decoder: nn.Module, layout: Layout, stages: Sequence[str]) -> None:
        """Take it.

        Args:
            decoder: from the embedding to the final norm, with all layers that the stages run.
            layout: the layers of A, B and C.
            stages: of "A", "AB", "FULL"; in this order the results come.
        """
        self._decoder, self._stages = decoder, tuple(stages)
        self._tree = segment_tree(layout, self._stages)
        self.layer_passes = sum(len(segment.layers) for segment in self._tree)
        self._layers, self._norm = list(decoder.get_submodule("layers").children()), decoder.get_submodule("norm")
        self._own = decoder.get_submodule("layers")

    def __call__(self, entering: Mapping[str, torch.Tensor], positions: torch.Tensor | None) -> list[torch.Tensor]:
        """The final hidden states after the norm at every stage, shape (n, seqlen, hidden) each.

        Args:
            entering: `input_ids` or `inputs_embeds`, as the decoder takes them.
            positions: of the tokens in their documents, as `Batch` has them.
        """
        ends: dict[str | None, torch.Tensor] = {}
        final: dict[str, torch.Tensor] = {}
        with self._bare():
            for segment in self._tree:
                given = {"inputs_embeds": ends[segment.parent]} if segment.parent else entering
                with self._alone(segment):
                    run = self._decoder(**given, position_ids=positions, use_cache=False)
                ends[segment.name] = run.last_hidden_state
                final |= dict.fromkeys(segment.ends, run.last_hidden_state)
        return [self._norm(final[stage]) for stage in self._stages]

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The decoder without its norm, which only the end of a stage goes through."""
        self._decoder.norm = nn.Identity()
        try:
            yield
        finally:
            self._decoder.norm, self._decoder.layers = self._norm, self._own

    @contextmanager
    def _alone(self, segment: Segment) -> Iterator[None]:
        """The decoder with the layers of one segment and no others."""
        own = set(segment.layers)
        modules = (layer if index in own else PassLayer(index) for index, layer in enumerate(self._layers))
        self._decoder.layers = nn.ModuleList(modules)
        yield
