"""Which layers are corrected, and what each is to bring the stream to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mistral_prune_lora.errors import LayoutError


@dataclass(frozen=True)
class Place:
    """A layer that is corrected.

    Attributes:
        layer: its original index.
        before: the layer, or the end of the model, that the corrected stream enters: what leaves `layer` is brought
            close to what enters that one in the dense model.
    """

    layer: int
    before: int


def correction_places(active: Sequence[int], own: Sequence[int], num_layers: int, behind: int = 0) -> list[Place]:
    """Where one part's adapter corrects, front to back.

    A part is corrected in its last layer before every cut, and, if asked for, in its layers just behind the cut. A part
    without a cut behind any of its runs of layers (C, or a B that ends where A goes on) is corrected in the last layer
    of each run: what it makes up for there is what earlier parts' adapters have left.

    Args:
        active: all layers that the student runs, ascending.
        own: the part's layers among them.
        num_layers: of the dense model.
        behind: how many layers behind each cut are corrected too.

    Raises:
        LayoutError: nothing is cut behind A's layers, and so nothing is to be corrected.
    """
    follows = dict(zip(active, [*active[1:], num_layers], strict=True))
    held = set(own)
    cuts = [layer for layer in own if follows[layer] != layer + 1]
    ends = cuts or [layer for layer in own if follows[layer] not in held]
    if not cuts and len(own) == len(active):
        raise LayoutError(
            "no layers are cut away behind any layer of the part, so nothing is left to correct",
            mend="an adapter in closed form makes up for layers that are missing",
        )
    chosen = set(ends)
    for cut in cuts:
        layer = cut
        for _ in range(behind):
            layer = follows[layer]
            if layer not in held:
                break
            chosen.add(layer)
    return [Place(layer, follows[layer]) for layer in sorted(chosen)]
