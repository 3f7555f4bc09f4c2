"""Everything that a configuration names, looked at before the first job: from headers and small reads alone.

Imports no torch. What a job would refuse after hours of others' work is refused here, by the functions that the jobs
ask themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.checkpoints.adapter import Adapter, open_adapter
from mistral_prune_lora.checkpoints.adapter_config import CONFIG_FILE
from mistral_prune_lora.checkpoints.adapter_scope import check_for_a, from_compact
from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.dense import open_dense
from mistral_prune_lora.checkpoints.directories import bundle_layers, is_bundle_dir, is_model_dir
from mistral_prune_lora.checkpoints.family_tensors import check_layer_tensors, check_model_tensors
from mistral_prune_lora.checkpoints.pruning_identity import identities
from mistral_prune_lora.checkpoints.tokenizer import find_tokenizer, own_tokenizer
from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.matching import check_fit, check_same_model, split_updates
from mistral_prune_lora.workflow.configuration import (
    experiment_layout,
    merged_parts,
    missing_text,
    needed_parts,
)
from mistral_prune_lora.workflow.dense_models import DenseModels
from mistral_prune_lora.workflow.findings import Findings
from mistral_prune_lora.workflow.restoring import CLOSED_FORM, TRAIN
from mistral_prune_lora.workflow.text_checks import check_texts

_SIGNS = {
    "model": (is_model_dir, "config.json"),
    "bundle": (is_bundle_dir, "bundle_meta.json and no layer_XXX.safetensors"),
}


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        faults: mistakes that would end a job, a line each with the path of its key.
        warnings: what makes results doubtful, likewise.
    """

    faults: list[str]
    warnings: list[str]


def check_inputs(config: Mapping) -> Checked:
    """Look at all models, parts, adapters and texts that a configuration names.

    What no experiment uses is only warned of.

    Args:
        config: as `configuration.check_config` leaves it.
    """
    findings, dense = Findings(), DenseModels(config)
    _check_models(config, findings)
    adapters: dict[str, Adapter] = {}
    for name, experiment in config["experiments"].items():
        layout = experiment_layout(config, name)
        path = f"experiments.{name}"
        model = dense.local(experiment["model"])
        bases: dict[str, Checkpoint | None] = dict.fromkeys("ABC", model)
        if "pruned" in experiment and needed_parts(experiment, layout):
            bases = _check_pruned(experiment, layout, model, f"{path}.pruned", findings)
        for part in merged_parts(experiment, layout):
            if experiment["adapters"][part] not in (TRAIN, CLOSED_FORM, None):
                _check_adapter(experiment, layout, part, bases[part], adapters, f"{path}.adapters.{part}", findings)
    check_texts(config, dense, findings)
    return Checked(findings.faults, findings.warnings)


def _check_models(config: Mapping, findings: Findings) -> None:
    used = {experiment["model"] for experiment in config["experiments"].values()}
    for name, model in config["models"].items():
        folder, path = model.get("path"), f"models.{name}.path"
        if folder is None:
            continue
        if not os.path.isdir(folder):
            findings.tell(path, missing_text(folder, "give a dense model's directory"), fault=name in used)
        elif not is_model_dir(folder):
            findings.tell(path, f"{folder} holds no config.json", fault=name in used)
        else:
            with findings.asking(path, fault=name in used):
                count = open_dense(folder).config["num_hidden_layers"]
                if count != model["num_layers"]:
                    told = f"{model['num_layers']}, and {folder}/config.json counts {count} layers"
                    findings.tell(f"models.{name}.num_layers", told, fault=name in used)
                _check_tokenizer(folder)


def _check_tokenizer(folder: str) -> None:
    """Raise a PipelineError unless there is a tokenizer where the jobs look for a model's."""
    try:
        find_tokenizer(folder)
    except CheckpointError:
        if own_tokenizer(folder):
            raise
        raise CheckpointError(
            "there is no tokenizer", where=folder, mend="put the model's tokenizer files there"
        ) from None


def _check_pruned(
    experiment: Mapping, layout: Layout, model: Checkpoint | None, path: str, findings: Findings
) -> dict[str, Checkpoint | None]:
    """Check the parts of a given pruned model, as far as they are needed; those that could be opened, by part."""
    given, opened = experiment["pruned"], dict[str, Checkpoint | None](dict.fromkeys("ABC"))
    places = {"A": Path(given["A"]), **{part: Path(given["bundles"]) / part for part in "BC"}}
    for part in needed_parts(experiment, layout):
        folder, key = places[part], f"{path}.{'A' if part == 'A' else 'bundles'}"
        is_one, sign = _SIGNS["model" if part == "A" else "bundle"]
        if not os.path.isdir(folder):
            findings.tell(key, missing_text(folder, f"give the directory that pruning wrote {part} into"))
        elif not is_one(folder):
            findings.tell(key, f"{folder} holds no {sign}")
        else:
            with findings.asking(key):
                opened[part] = _opened_part(folder, part, layout, model or opened["A"])
    with findings.asking(path):
        # Each job that puts parts together says which carry no identity; here it would be said by all of them.
        identities(places.values())
    return opened


def _opened_part(folder: Path, part: str, layout: Layout, like: Checkpoint | None) -> Checkpoint:
    """Open one part; PipelineError if it lacks something or is not of the model that it should be like."""
    layers = layout.layers_of(part)
    if part != "A" and (held := bundle_layers(folder)) != layers:
        raise LayoutError(
            f"holds layers {list(held)} where the manifest gives {list(layers)} to {part}",
            where=folder,
            mend="use the bundles that were cut from this model",
        )
    opened = open_checkpoint(folder)
    if part == "A":
        check_model_tensors(opened.config, opened.shapes, layers, folder)
    elif like:
        check_layer_tensors(like.config, opened.shapes, layers, folder)
    shapes = like.shapes if like else {}
    other = next((name for name, shape in opened.shapes.items() if shapes.get(name, shape) != shape), None)
    if other and like:
        raise CheckpointError(
            f"{other} has the shape {opened.shapes[other]}, and in {like.path} it is {shapes[other]}",
            where=folder,
            mend="use parts that were cut from this dense model",
        )
    return opened


def _check_adapter(
    experiment: Mapping,
    layout: Layout,
    part: str,
    base: Checkpoint | None,
    opened: dict[str, Adapter],
    path: str,
    findings: Findings,
) -> None:
    source = experiment["adapters"][part]
    if not os.path.isdir(source):
        findings.tell(
            path, missing_text(source, "give the directory of a PEFT adapter, or the word train or closed-form")
        )
        return
    if not Path(source, CONFIG_FILE).exists() and (below := _adapters_below(Path(source))):
        findings.tell(path, f"{source} holds no {CONFIG_FILE}; of the directories in it, {below} does")
        return
    with findings.asking(path):
        place = os.path.abspath(source)
        if place not in opened:
            opened[place] = open_adapter(place)
        _check_fits(opened[place], experiment["adapter_indices"], layout, part, base)


def _adapters_below(folder: Path) -> str:
    """The adapter directories one and two levels below a folder, at most three of them."""
    found = sorted(file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{CONFIG_FILE}"))
    return ", ".join(map(str, found[:3]))


def _check_fits(adapter: Adapter, indices: str, layout: Layout, part: str, base: Checkpoint | None) -> None:
    """Raise a PipelineError if the merge into a part would refuse an adapter, by all but the values of its tensors.

    Args:
        base: the part, or the dense model that it will be cut from; None where neither is at hand.
    """
    if part == "A" and indices == "compact":
        adapter = from_compact(adapter, layout)
    check_same_model(adapter, layout, layout.num_layers)
    if part == "A":
        check_for_a(adapter, layout)
    scope = frozenset(layout.layers_of(part))
    inside, _ = split_updates(adapter, scope, outside=part == "A")
    if base:
        check_fit(base, adapter, inside, scope, outside=part == "A")
