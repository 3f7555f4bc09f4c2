"""Why an evaluation came to NaN or infinity: which tensor, or which layers and which window.

Layers are not looked through before they are run, which would cost time for nothing: whatever is none in their weights
makes the hidden states none, and those are looked at. Only then are the weights read again, to name the one at fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mistral_prune_lora.errors import NumberError
from mistral_prune_lora.storage.finite import mend_for, tensor_fault
from mistral_prune_lora.streaming.compute import LayerSource
from mistral_prune_lora.streaming.passage import Origin, Passage


@contextmanager
def layers_blamed(origin: Origin, sources: Sequence[LayerSource], passage: Passage, words: str) -> Iterator[None]:
    """Word the NumberError of a window that arises in the block by what brought it.

    Args:
        origin: where the hidden states come from.
        sources: the layers that are run on them.
        passage: the windows, of which a shard's are named by their numbers among all, and how they are run.
        words: what is being run: a stage.
    """
    try:
        yield
    except NumberError as error:
        if error.window is None:
            raise
        raise _fault(error.window, origin, sources, passage, words) from None


def _fault(window: int, origin: Origin, sources: Sequence[LayerSource], passage: Passage, words: str) -> NumberError:
    fault, dtype = origin.fault(window), passage.compute.dtype
    for source in sources:
        for entry in source.checkpoint.layer(source.index).values():
            fault = fault or tensor_fault(entry, dtype)
    if fault:
        return fault
    run = f" in layers {sources[0].index}-{sources[-1].index}" if sources else ""
    number = passage.first + window
    return NumberError(
        f"{words}: the hidden states of window {number} become NaN or infinity{run}, though all weights are numbers",
        where=sources[-1].checkpoint.path if sources else None,
        mend=mend_for(dtype),
    )
