"""What a configuration asks for, in plain text: its experiments, how large what they make is, and what is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mistral_prune_lora.errors import printable
from mistral_prune_lora.layout.partition import Layout, spans
from mistral_prune_lora.sizes import size_text
from mistral_prune_lora.storage.space import free_space
from mistral_prune_lora.workflow.amounts import KINDS, Amount, amounts
from mistral_prune_lora.workflow.checks import Checked, check_inputs
from mistral_prune_lora.workflow.configuration import (
    baseline_of,
    calibration_texts,
    closed_form_parts,
    dense_dir,
    experiment_layout,
    merged_parts,
    started_parts,
    trains,
)
from mistral_prune_lora.workflow.dense_models import DenseModels
from mistral_prune_lora.workflow.restoring import CLOSED_FORM, TRAIN

_RESULTS = Path("results")
_UNKNOWN = "unknown"
_WHY = "  what is unknown hangs on a model that is not fetched yet, or on a text that is taken whole"


def preview(config: Mapping, checked: Checked | None = None) -> str:
    """Describe what would be run.

    Args:
        config: as `configuration.check_config` leaves it.
        checked: what `checks.check_inputs` found in it; None asks it.

    Returns:
        Lines for each experiment, a table of sizes with the free space beside it, then warnings and faults.
    """
    checked = check_inputs(config) if checked is None else checked
    dense = DenseModels(config)
    made = {name: amounts(config, name, dense) for name in config["experiments"]}
    lines = [line for name in made for line in (*_experiment(config, name, made[name]), "")]
    lines += _sizes([amount for found in made.values() for amount in found], config["keep_activations"])
    for title, found in (("warnings", checked.warnings), ("faults", checked.faults)):
        lines += ["", f"{title}: {'none' if not found else len(found)}", *(f"  {line}" for line in found)]
    return "\n".join(printable(line) for line in lines) + "\n"


def _experiment(config: Mapping, name: str, made: Iterable[Amount]) -> Iterator[str]:
    experiment, layout = config["experiments"][name], experiment_layout(config, name)
    wanted = experiment["perplexity"]
    parts = [part for part in "ABC" if layout.layers_of(part)]
    stages = ", ".join(wanted["stages"])
    known = {kind: _sum(amount for amount in made if amount.kind == kind) for kind in KINDS}
    rows = {
        "model": _model(config, experiment["model"]),
        "layers": "   ".join(f"{part} {spans(layout.layers_of(part))}" for part in parts),
        "parts": f"given, {experiment['pruned']['A']}" if "pruned" in experiment else "pruned here",
        "adapters": _adapters(experiment, layout),
        "trained on": experiment["distill"]["dataset"] if trains(experiment, layout) else None,
        "calibrated on": _calibration(experiment, layout),
        "measured on": ", ".join(wanted["datasets"]),
        "stages": _stages(experiment, stages),
        "beside": baseline_of(config, name),
        "makes": ", ".join(f"{kind} {size}" for kind, size in known.items() if size) or "results only",
    }
    yield name
    yield from (f"  {key:<12} {value}" for key, value in rows.items() if value)


def _stages(experiment: Mapping, stages: str) -> str:
    """Every variant with the stages that it is measured at."""
    told = [f"{variant} {'FULL' if variant == 'dense' else stages}" for variant in experiment["perplexity"]["variants"]]
    for variant in experiment["baselines"]:
        told.append(variant if variant.startswith("joint-") else f"{variant} {stages}")
    return "; ".join(told)


def _model(config: Mapping, name: str) -> str:
    model = config["models"][name]
    source = model.get("path")
    if source is None:
        told = model["pypi"]["requirement"] if "pypi" in model else model["hub"]["repo_id"]
        source = f"{told}, {'fetched' if os.path.isdir(dense_dir(config, name)) else 'to be fetched'}"
    return f"{name} ({source}), {model['num_layers']} layers"


def _calibration(experiment: Mapping, layout: Layout) -> str | None:
    """The texts of adapters in closed form, if there are any, with their weights."""
    if not closed_form_parts(experiment, layout) and not started_parts(experiment, layout):
        return None
    texts = calibration_texts(experiment)
    return ", ".join(name if len(texts) == 1 else f"{name} ({weight:g})" for name, weight in texts.items())


def _adapters(experiment: Mapping, layout: Layout) -> str:
    told = {TRAIN: "trained", CLOSED_FORM: "in closed form", None: "none"}
    started = {part: " from closed form" for part in started_parts(experiment, layout)}
    sources = {part: experiment["adapters"][part] for part in merged_parts(experiment, layout)}
    return "   ".join(f"{part} {told.get(source, source)}{started.get(part, '')}" for part, source in sources.items())


def _sizes(made: Sequence[Amount], kept: bool) -> list[str]:
    """The table of sizes: what several experiments share counts once."""
    distinct = list({(amount.kind, amount.key): amount for amount in made}.values())
    rows = []
    for kind in KINDS:
        if size := _sum(amount for amount in distinct if amount.kind == kind):
            rows.append((kind + (" (deleted after use)" if kind == "activations" and not kept else ""), size))
    rows += [("in all", _sum(distinct)), (f"free in {_RESULTS}", size_text(free_space(_RESULTS)))]
    width = max(len(what) for what, _ in rows)
    known = sum(amount.nbytes or 0 for amount in distinct)
    short = ["  more than is free: take fewer windows, or work on another disk"] * (known > free_space(_RESULTS))
    why = [_WHY] * any(amount.nbytes is None for amount in distinct)
    return [
        "at most, what experiments share once",
        *(f"  {what:<{width}}  {size}" for what, size in rows),
        *why,
        *short,
    ]


def _sum(made: Iterable[Amount]) -> str:
    """Sizes added up, in words; empty if there are none."""
    made = list(made)
    known = [amount.nbytes for amount in made if amount.nbytes is not None]
    if len(known) == len(made):
        return size_text(sum(known)) if made else ""
    return f"{size_text(sum(known))} and more" if sum(known) else _UNKNOWN
