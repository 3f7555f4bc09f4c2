"""What an experiment is, in the words of a report."""

from __future__ import annotations

from collections.abc import Mapping, Set

from mistral_prune_lora.layout.partition import spans
from mistral_prune_lora.workflow.experiment import Experiment
from mistral_prune_lora.workflow.restoring import CLOSED_FORM, EXACT, SEQUENTIAL, TRAIN

_HOW_TO_RUN = {"threads", "keep_activations", "report"}
_HOW_TO_RUN_SECTION = {"distill": {"shards", "save_steps", "loggers"}, "perplexity": {"shards"}}


def described(experiment: Experiment) -> dict[str, str]:
    """What is told of an experiment, by what the words are about."""
    settings, layout = experiment.settings, experiment.layout
    parts = [part for part in "ABC" if layout.layers_of(part)]
    told = {
        "model": f"{settings['model']}, {layout.num_layers} layers",
        "layers": "; ".join(f"{part} {spans(layout.layers_of(part))}" for part in parts),
    }
    if "pruned" in settings:
        told["parts"] = f"given, {settings['pruned']['A']}"
    if experiment.merged_parts:
        started = experiment.started_parts
        told["adapters"] = "; ".join(f"{p} {_adapter(settings['adapters'][p], p in started)}" for p in parts)
        if settings["restore"] != SEQUENTIAL:
            told["restore"] = _restored(settings)
    if experiment.trained_parts:
        wanted = settings["distill"]
        count = "all" if wanted["windows"] is None else wanted["windows"]
        told["trained on"] = (
            f"{wanted['dataset']}, {count} windows of {wanted['seqlen']} tokens, {_loss(wanted['loss'])}"
        )
    measured = settings["perplexity"]
    told["measured on"] = (
        f"{', '.join(measured['datasets'])}, windows of {measured['seqlen']} tokens, {measured['dtype']}"
    )
    return told


def _adapter(source: str | None, started: bool) -> str:
    if source is None:
        return "left as it was cut"
    if source == TRAIN:
        return "trained here from its closed form" if started else "trained here"
    return "in closed form" if source == CLOSED_FORM else f"given, {source}"


def _restored(settings: Mapping) -> str:
    if settings["restore"] == EXACT:
        return "exact, each bundle puts the original weights back of what was healed before it"
    return f"shared, A's adapter is trained for {', '.join(settings['distill']['stages'])} at once"


def _loss(loss: Mapping) -> str:
    return f"{loss['kd_loss']} with weight {loss['kd_alpha']:g}" if loss["kd_alpha"] else "cross-entropy alone"


def deciding(config: Mapping) -> dict:
    """A configuration without what changes no result: with another number of shards, the pages stay as they are."""
    experiments = {name: _deciding(settings) for name, settings in config["experiments"].items()}
    return _without(config, _HOW_TO_RUN) | {"experiments": experiments}


def _deciding(settings: Mapping) -> dict:
    there = {section: keys for section, keys in _HOW_TO_RUN_SECTION.items() if settings.get(section)}
    return dict(settings) | {section: _without(settings[section], keys) for section, keys in there.items()}


def _without(settings: Mapping, keys: Set[str]) -> dict:
    return {key: value for key, value in settings.items() if key not in keys}
