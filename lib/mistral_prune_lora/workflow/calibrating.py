"""The dense model's way through calibration windows, which all adapters in closed form of one pruning go along.

A correction asks for what the dense model has behind the cut, and sets out from what enters the corrected layer, which
is the dense model's too as long as nothing below is healed or missing. These stations of one way are segments, each run
on from the one before, and kept like those of an evaluation: with another rank, ridge or weight of tokens, only the
corrected layers run again.
"""

from __future__ import annotations

from mistral_prune_lora.closed_form.places import Place, correction_places
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.workflow.artefacts import Run, Source, Windows
from mistral_prune_lora.workflow.restoring import STAGE_OF_PART


def stations_of(layout: Layout, part: str, *, unhealed: bool) -> tuple[int, ...]:
    """How many of the dense model's first layers lie before each of the states that a part's corrections read.

    Of layers that are corrected behind a cut, they are run on from there.

    Args:
        layout: the layers of A, B and C.
        part: "A", "B" or "C".
        unhealed: whether the student's layers are those that pruning wrote; C's never are, it would be the dense model.
    """
    places, active = _places(layout, part)
    found = {place.before for place in places}
    if unhealed and part != "C" and active[: places[0].layer] == tuple(range(places[0].layer)):
        found.add(places[0].layer)
    return tuple(sorted(found - {0}))


def layers_run(layout: Layout, part: str, layers_behind: int, *, unhealed: bool) -> int:
    """How many layers the corrections of a part run, beside those up to the stations; arguments as for these."""
    places, active = _places(layout, part, layers_behind)
    entering = places[0].layer in stations_of(layout, part, unhealed=unhealed)
    first = places[0].layer if entering else 0
    return 2 * len(places) + sum(first <= layer <= places[-1].layer for layer in active)


def ends(layout: Layout) -> list[int]:
    """The stations of all parts of a layout, in order.

    They do not depend on which parts are healed in closed form, so that one part's adapter is never made again since
    another one's is asked for.
    """
    held = [part for part in "ABC" if layout.layers_of(part)]
    return sorted({station for part in held for station in stations_of(layout, part, unhealed=True)})


def dense_way(
    model: Source, layout: Layout, windows: Windows, batch_size: int, dtype: str, shards: int
) -> dict[int, Run]:
    """The segments between the stations of a layout, by how many layers lie before their end."""
    way: dict[int, Run] = {}
    source, start = None, 0
    for end in ends(layout):
        layers, label = tuple(range(start, end)), f"dense{start:03d}-{end - 1:03d}"
        how = (windows, batch_size, dtype, model, layout.num_layers)
        way[end] = source = Run(label, model, model, layers, source, *how, shards=shards)
        start = end
    return way


def _places(layout: Layout, part: str, layers_behind: int = 0) -> tuple[list[Place], tuple[int, ...]]:
    """Where a part is corrected, and the layers of its student; errors as for `correction_places`."""
    active = layout.active(STAGE_OF_PART[part])
    return correction_places(active, layout.layers_of(part), layout.num_layers, layers_behind), tuple(active)
