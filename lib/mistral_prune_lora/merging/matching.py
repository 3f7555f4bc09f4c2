"""Whether an adapter fits what it goes onto: every tensor of it matched to a weight, by names and shapes alone.

Asked by the merge before it writes, and by the workflow before it plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.checkpoints.adapter import Adapter, Update
from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.directories import is_model_dir
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.manifest import read_layout
from mistral_prune_lora.checkpoints.tensor_names import HEAD_MODULE, LAYER_PREFIX
from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.layout.partition import Layout, spans
from mistral_prune_lora.storage.dtype_names import FLOATS


def split_updates(adapter: Adapter, scope: frozenset[int], *, outside: bool) -> tuple[dict[str, Update], list[str]]:
    """(the updates that are for some layers, by weight name; the names of the tensors that are not).

    Args:
        adapter: under original layer indices.
        scope: the layers.
        outside: whether what lies outside of layers (lm_head) is in scope too.

    Raises:
        AdapterError: nothing of it is in scope.
    """
    inside, left_out = {}, []
    for module, update in adapter.updates.items():
        match = LAYER_PREFIX.match(module)
        if int(match[1]) in scope if match else outside:
            inside[f"{module}.weight"] = update
        else:
            left_out += [entry.stored_name for entry in update.entries]
    if not inside:
        raise AdapterError(
            f"matches nothing: it has no tensors for layers {spans(scope)}",
            where=adapter.path,
            mend="use the adapter that was trained for these layers",
        )
    return inside, left_out


def check_fit(
    base: Checkpoint, adapter: Adapter, inside: Mapping[str, Update], scope: frozenset[int], *, outside: bool
) -> None:
    """Raise an AdapterError unless updates fit the weights that they are for, and none of those lacks its update.

    Args:
        base: what holds the weights, from which only headers are read: the part itself, or the dense model.
        adapter, scope, outside: as for `split_updates`, which gives `inside`.
    """
    for name, update in inside.items():
        entry, module = base.entries.get(name), update.module
        if entry is None:
            raise AdapterError(
                f"has an update for {module}, which this model does not have",
                where=adapter.path,
                mend="use its own adapter",
            )
        if not adapter.targets(module):
            raise AdapterError(
                f"has tensors for {module}, which its configuration does not target; PEFT would drop them",
                where=adapter.path,
                mend="use the adapter_config.json that was saved with these tensors",
            )
        if tuple(entry.shape) != update.shape:
            raise AdapterError(
                f"{module} is {tuple(entry.shape)} in the model and {update.shape} in the adapter",
                where=adapter.path,
                mend="use an adapter that was trained for this model",
            )
        if entry.dtype not in FLOATS:
            raise AdapterError(
                f"{module} is stored as {entry.dtype}: quantised weights are not merged here",
                where=entry.file,
                mend="merge into the unquantised model (float32, bfloat16 or float16)",
            )
        if module == HEAD_MODULE and base.config.get("tie_word_embeddings"):
            raise AdapterError(
                "adapts lm_head, which is also the embedding of this model", where=adapter.path, mend="untie them first"
            )
    _check_complete(base, adapter, inside, scope, outside=outside)


def _check_complete(
    base: Checkpoint, adapter: Adapter, inside: Mapping[str, Update], scope: frozenset[int], *, outside: bool
) -> None:
    for name, entry in base.entries.items():
        match = LAYER_PREFIX.match(name)
        module = name.removesuffix(".weight")
        wanted = (int(match[1]) in scope if match else outside) and len(entry.shape) == 2
        if wanted and module != name and name not in inside and adapter.targets(module):
            raise AdapterError(
                f"targets {module}, but holds no tensors for it; PEFT would merge random ones",
                where=adapter.path,
                mend="train or copy the adapter again",
            )


def check_same_model(adapter: Adapter, layout: Layout | None, num_layers: int | None) -> None:
    """Raise an AdapterError if an adapter has layers that the model has not, or its own base was pruned otherwise.

    Its own base is asked where it is at hand. Of two models of one pruning, one has restored some of what the other
    drops; that is no contradiction.
    """
    beyond = [m[0] for m in map(LAYER_PREFIX.match, adapter.updates) if m and int(m[1]) >= (num_layers or math.inf)]
    if beyond:
        raise AdapterError(
            f"has tensors for {beyond[0].rstrip('.')}, but the model has {num_layers} layers",
            where=adapter.path,
            mend="use an adapter that was trained for this model",
        )
    named = adapter.base_model
    if not layout or not named or not is_model_dir(named):
        return
    theirs, count = layout_of(named)
    ours = set(layout.dropped)
    nested = theirs is None or ours <= set(theirs.dropped) or ours >= set(theirs.dropped)
    if count != layout.num_layers or not nested:
        raise AdapterError(
            f"was trained on {named}, which has or drops other layers than this model",
            where=adapter.path,
            mend="use the adapter that was trained for this pruning",
        )


def layout_of(model: str | Path) -> tuple[Layout | None, int]:
    """(the layout by a model directory's manifest, the dense model's layer count); reads no weights."""
    layout, num_layers = read_layout(model), read_config(model)["num_hidden_layers"]
    return layout, layout.num_layers if layout else num_layers
