"""How many bytes experiments will make, from the headers of what is at hand. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.layout.segments import segment_tree, shared_segments
from mistral_prune_lora.storage.dtype_names import COMPUTE, FLOATS, ITEMSIZES
from mistral_prune_lora.storage.safetensors_file import TensorEntry
from mistral_prune_lora.text.benchmarks import BENCHMARKS
from mistral_prune_lora.workflow.calibrating import ends
from mistral_prune_lora.workflow.configuration import (
    calibration_texts,
    closed_form_parts,
    experiment_layout,
    merged_parts,
    needed_parts,
    started_parts,
    trained_parts,
)
from mistral_prune_lora.workflow.dense_models import DenseModels
from mistral_prune_lora.workflow.restoring import changed_layers, original_layers, undone_part

KINDS = (
    "dense model",
    "pruned parts",
    "adapters",
    "merged parts",
    "teacher's states",
    "prefix states",
    "activations",
)
_LORA_BYTES = 4  # of a number: adapters are trained and saved in float32


@dataclass(frozen=True)
class Amount:
    """Something that an experiment makes.

    Attributes:
        kind: one of KINDS.
        key: what it follows from; of two experiments with the same key, it is the same thing.
        nbytes: its size; None if that is not known yet.
    """

    kind: str
    key: str
    nbytes: int | None


def amounts(config: Mapping, name: str, dense: DenseModels) -> list[Amount]:
    """What one experiment makes at most: as if nothing were there but what was fetched.

    Args:
        config: checked, with its defaults.
        name: of the experiment.
        dense: its models.
    """
    experiment, layout = config["experiments"][name], experiment_layout(config, name)
    model = dense.at_hand(experiment["model"])
    merged, trained = merged_parts(experiment, layout), trained_parts(experiment, layout)
    given = experiment.get("pruned")
    # Roughly: an adapter of A says nothing about the pruned parts, but all that training is told about all adapters.
    pruning = [experiment["model"], given or [layout.num_layers, layout.b, layout.c]]
    healing = [pruning, experiment["adapters"], experiment["distill"] if trained else None]
    merging = [healing, experiment["merge"], experiment["adapter_indices"], experiment["restore"]]
    found = []
    if model is None and not dense.is_local(experiment["model"]):
        found.append(_amount("dense model", [experiment["model"]], None))
    weights = {part: _held(part, layout, model, given) for part in "ABC" if layout.layers_of(part)}
    if not given and needed_parts(experiment, layout):
        found.append(_amount("pruned parts", pruning, _total(_bytes(weights[part]) for part in weights)))
    if trained:
        sizes = [_lora_bytes(experiment["distill"]["lora"], weights[part]) for part in trained]
        found.append(_amount("adapters", healing, _total(sizes)))
    computed = [*closed_form_parts(experiment, layout), *started_parts(experiment, layout)]
    hidden = model.config.get("hidden_size") if model else None
    if computed:
        key = [healing, experiment["closed_form"]]
        found.append(
            _amount(
                "adapters", key, len(computed) * _closed_form_bytes(experiment["closed_form"], model) if model else None
            )
        )
        whole = {**experiment["closed_form"], "shards": experiment["distill"]["shards"]}
        whole["windows"] += whole["held_out"]
        stations = ends(layout)
        for text in calibration_texts(experiment):
            how = {**experiment, "closed_form": whole}
            found.append(_states("activations", config, how, "closed_form", hidden, text, stations, len(stations)))
    if merged:
        cast = experiment["merge"]["output_dtype"]
        sizes = [_bytes(weights[part], cast) for part in merged]
        sizes += [_undo_bytes(experiment, layout, part, weights) for part in merged]
        found.append(_amount("merged parts", merging, _total(sizes)))
    for baseline in experiment["baselines"]:
        stage = baseline.removeprefix("joint-")
        parts = [part for part in PARTS_OF_STAGE.get(stage, "ABC") if part in weights]
        sizes = [_lora_bytes(experiment["distill"]["lora"], weights[part]) for part in parts]
        found.append(_amount("adapters", [healing, baseline], _total(sizes)))
        cast = experiment["merge"]["output_dtype"]
        found.append(_amount("merged parts", [merging, baseline], _total(_bytes(weights[p], cast) for p in parts)))
    if trained and experiment["distill"]["share_teacher_states"]:
        found.append(_states("teacher's states", config, experiment, "distill", hidden))
    if experiment["distill"]["share_prefix_states"]:
        later = [part for part in trained if part != "A"]
        found += [_states("prefix states", config, experiment, "distill", hidden, key=[healing, p]) for p in later]
    return found + list(_activations(config, experiment, layout, pruning, merging, hidden))


def _activations(
    config: Mapping, experiment: Mapping, layout: Layout, pruning: list, merging: list, hidden: int | None
) -> Iterator[Amount]:
    wanted = experiment["perplexity"]
    shared = len(shared_segments(segment_tree(layout, wanted["stages"])))
    merged = segment_tree(layout, wanted["stages"], original_layers(experiment, layout))
    files = {
        "dense": ([experiment["model"]], int(wanted["compare_with_dense"])),
        "pruned": (pruning, shared),
        "merged": (merging, len(shared_segments(merged))),
    }
    for variant in wanted["variants"]:
        key, count = files[variant]
        for text in wanted["datasets"] if count else ():
            yield _states("activations", config, experiment, "perplexity", hidden, text, [variant, key, count], count)


def _states(
    kind: str,
    config: Mapping,
    experiment: Mapping,
    section: str,
    hidden: int | None,
    text: str | None = None,
    key: object = None,
    count: int = 1,
) -> Amount:
    """Some files of hidden states of one text; of those that are gathered from shards, these too."""
    wanted = experiment[section]
    settings = config["datasets"][text or wanted["dataset"]]
    benchmark = BENCHMARKS.get(settings.get("dataset"))
    limits = [wanted["windows"], benchmark.windows(settings["split"]) if benchmark else None]
    windows = min((limit for limit in limits if limit is not None), default=None)
    shape, copies = [windows, wanted["seqlen"], hidden], 1 + (wanted["shards"] > 1)
    nbytes = None if None in shape else copies * count * math.prod(shape) * ITEMSIZES[COMPUTE[wanted["dtype"]]]
    return _amount(kind, [experiment["model"], settings, shape, copies, wanted["dtype"], key], nbytes)


def _amount(kind: str, key: object, nbytes: int | None) -> Amount:
    return Amount(kind, json.dumps(key, sort_keys=True), nbytes)


def _held(part: str, layout: Layout, model: Checkpoint | None, given: Mapping | None) -> list[TensorEntry] | None:
    """The tensors of a part: of a given one, or of the dense model; None if they are not at hand."""
    if given:
        try:
            folder = given["A"] if part == "A" else Path(given["bundles"]) / part
            return list(open_checkpoint(folder).entries.values())
        except PipelineError:
            return None
    if model is None:
        return None
    layers = set(layout.layers_of(part))
    placed = ((entry, LAYER_PREFIX.match(name)) for name, entry in model.entries.items())
    return [entry for entry, match in placed if (int(match[1]) in layers if match else part == "A")]


def _bytes(entries: list[TensorEntry] | None, cast: str | None = None) -> int | None:
    """The bytes of some tensors, floats cast to a dtype of a configuration."""
    if entries is None:
        return None
    itemsize = ITEMSIZES[COMPUTE[cast]] if cast else 0
    floats = ("F64", *FLOATS)
    return sum(math.prod(e.shape) * itemsize if cast and e.dtype in floats else e.nbytes for e in entries)


def _lora_bytes(lora: Mapping, entries: list[TensorEntry] | None) -> int | None:
    """The bytes of an adapter for some weights."""
    if entries is None:
        return None
    names = tuple(f".{module}.weight" for module in lora["target_modules"])
    shapes = [entry.shape for entry in entries if entry.stored_name.endswith(names) and len(entry.shape) == 2]
    numbers = (lora["rank"] * (out + inside) + out * lora["use_dora"] for out, inside in shapes)
    return _LORA_BYTES * sum(numbers)


def _closed_form_bytes(wanted: Mapping, model: Checkpoint) -> int:
    """The bytes of an adapter in closed form, of a part with one cut."""
    inner, hidden = model.config["intermediate_size"], model.config["hidden_size"]
    rank = min(wanted["rank"] or hidden, hidden, inner)
    return _LORA_BYTES * (1 + wanted["layers_behind"]) * rank * (inner + hidden)


def _undo_bytes(
    experiment: Mapping, layout: Layout, part: str, weights: Mapping[str, list[TensorEntry] | None]
) -> int | None:
    """What a bundle puts back, at most: all of the layers that an adapter changes, as its part has them on the mean."""
    undone = undone_part(experiment, layout, part)
    if undone is None or (whole := _bytes(weights[undone])) is None:
        return None if undone else 0
    return math.ceil(whole * len(changed_layers(experiment, layout, undone)) / len(layout.layers_of(undone)))


def _total(sizes: Iterable[int | None]) -> int | None:
    """Their sum; None if one is not known."""
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total
