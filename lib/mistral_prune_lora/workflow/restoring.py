"""What restoring a bundle does to parts that were healed before it: by the words of an experiment's key `restore`.

sequential: an adapter stays merged in all stages, and the next one is trained on what it left. shared: likewise, but
A's is trained for all stages at once, so that B and C may do without. exact: a bundle puts the original bytes back of
what the part before it was healed with, so that the last stage is the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mistral_prune_lora.closed_form.places import correction_places
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES, Layout

SEQUENTIAL, EXACT, SHARED = "sequential", "exact", "shared"
TRAIN, CLOSED_FORM = "train", "closed-form"  # adapters that are made here; any other word is the path of one
STAGE_OF_PART = {part: parts for parts, part in zip(STAGES, "ABC", strict=True)}


def undone_part(experiment: Mapping, layout: Layout, part: str) -> str | None:
    """The part that restoring another one puts back in its original bytes: the healed one before it, if any."""
    before = [each for each in "ABC"[: "ABC".index(part)] if layout.layers_of(each)]
    if experiment["restore"] != EXACT or not before or not layout.layers_of(part):
        return None
    return before[-1] if experiment["adapters"][before[-1]] is not None else None


def original_layers(experiment: Mapping, layout: Layout) -> dict[str, frozenset[int]]:
    """Of each stage, the layers that it runs with original weights which an adapter has changed in a smaller stage."""
    undone = {part: undone_part(experiment, layout, part) for part in "ABC"}
    return {
        stage: frozenset(
            layer
            for part in PARTS_OF_STAGE[stage]
            if (other := undone[part])
            for layer in changed_layers(experiment, layout, other)
        )
        for stage in STAGES
    }


def changed_layers(experiment: Mapping, layout: Layout, part: str) -> tuple[int, ...]:
    """The layers that a part's adapter changes at most; of a given one, nothing is known before it is read."""
    own, source = layout.layers_of(part), experiment["adapters"][part]
    if source == TRAIN:
        wanted = experiment["distill"]["parts"][part]["adapt_layers"]
        return own if wanted == "all" else tuple(wanted)
    if source == CLOSED_FORM:
        behind = experiment["closed_form"]["layers_behind"]
        active = layout.active(STAGE_OF_PART[part])
        return tuple(place.layer for place in correction_places(active, own, layout.num_layers, behind))
    return own


def restore_faults(experiment: Mapping, layout: Layout, path: str) -> Iterator[str]:
    """A line for each adapter that contradicts how bundles are restored."""
    if "merged" not in experiment["perplexity"]["variants"]:
        return
    held = [part for part in "ABC" if layout.layers_of(part)]
    without = [part for part in held if experiment["adapters"][part] is None]
    if experiment["restore"] == SHARED:
        if experiment["adapters"]["A"] != TRAIN:
            yield f"{path}.restore: shared trains A's adapter for all stages, and adapters.A is not the word train"
        if experiment["distill"]["loss"]["hidden"]:
            yield f"{path}.distill.loss.hidden: is of one stage, and with restore: shared several are trained"
        return
    if experiment["restore"] != EXACT:
        for part in without:
            told = "null is for restore: exact or shared; here every part with layers has an adapter"
            yield f"{path}.adapters.{part}: {told}"
        return
    if held == ["A"]:
        yield f"{path}.restore: exact puts back what bundles restore, and there are none"
    elif held[-1] not in without:
        told = f"needs none, since with {held[-1]} the model is the dense one; write null"
        yield f"{path}.adapters.{held[-1]}: with restore: exact, {held[-1]} {told}"
    if without == held:
        yield f"{path}.adapters: all are null, so that nothing is healed; leave merged out of perplexity.variants"
    if experiment["merge"]["output_dtype"]:
        yield f"{path}.merge.output_dtype: with restore: exact, weights keep their own dtype; write null"
