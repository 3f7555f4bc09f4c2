"""What the job of each artefact needs, by the sizes of the model that it is made from."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import ceil
from pathlib import Path

from mistral_prune_lora.distillation.schedule import FROZEN_BATCH
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE
from mistral_prune_lora.workflow import resources
from mistral_prune_lora.workflow.artefacts import Merge, Pruning, Run, Source, Windows
from mistral_prune_lora.workflow.choice import Choice
from mistral_prune_lora.workflow.experiment import Experiment
from mistral_prune_lora.workflow.geometry import Geometry
from mistral_prune_lora.workflow.healing import ClosedForm, PrefixStates, TeacherStates, Training
from mistral_prune_lora.workflow.resources import Needs, Pass


def geometry(model: Source, num_layers: int) -> Geometry:
    """A dense model's sizes: its own once it is there, before that those of the widest model so deep."""
    if Path(model.folder, "config.json").is_file():
        return _read(model.folder)
    return Geometry.assumed(num_layers)


@cache
def _read(folder: str) -> Geometry:
    return Geometry.read(folder)


def of_fetch(model: Source, num_layers: int, *, converted: bool) -> Needs:
    """Of fetching a dense model; `converted` from GGUF."""
    return resources.fetch(geometry(model, num_layers), converted=converted)


def of_pruning(pruning: Pruning) -> Needs:
    """Of cutting a model."""
    return resources.prune(geometry(pruning.model, pruning.layout.num_layers))


def of_windows() -> Needs:
    """Of cutting a text into windows."""
    return resources.windows()


def of_teacher(states: TeacherStates, shards: int = 1) -> Needs:
    """Of the dense model's pass over the training windows, or over one of so many shards of them."""
    run = Pass(states.dtype, states.windows.seqlen, _share(states.windows, shards))
    return resources.teacher_states(geometry(states.model, states.num_layers), run)


def of_prefix(states: PrefixStates, shards: int = 1) -> Needs:
    """Of the frozen layers' pass over the training windows, or over one of so many shards of them."""
    run = Pass(states.dtype, states.windows.seqlen, _share(states.windows, shards))
    done = states.start.layers if states.start else ()
    return resources.segment(geometry(states.model, states.num_layers), len(states.layers) - len(done), run)


def of_training(training: Training) -> Needs:
    """Of training an adapter."""
    settings, optimiser = training.settings, training.settings["optimiser"]
    how = resources.Training(
        settings["dtype"],
        training.data.windows.seqlen,
        optimiser["batch_size"],
        optimiser["gradient_accumulation"],
        optimiser["steps"],
        settings["lora"]["rank"],
        settings["gradient_checkpointing"],
        training.data.teacher is not None,
    )
    sizes = geometry(training.model, training.num_layers)
    stored = len(training.data.prefix.layers) if training.data.prefix else 0
    return resources.train_adapter(sizes, training.active - stored, training.adapted, how)


def of_closed_form(made: ClosedForm) -> Needs:
    """Of computing an adapter in closed form."""
    settings, windows = made.settings, [cut for cut, _ in made.texts]
    known = [cut.count for cut in windows if cut.count]
    run = Pass(settings["dtype"], windows[0].seqlen, sum(known), settings["batch_size"])
    return resources.closed_form(geometry(made.model, made.num_layers), made.runs, run)


def of_merge(merge: Merge) -> Needs:
    """Of merging an adapter."""
    return resources.merge(geometry(merge.dense, merge.num_layers), len(merge.layers), ends=merge.part == "A")


def of_strength(merge: Merge) -> Needs:
    """Of reading an adapter and the weights that it is for: as much as a merge, and no GPU."""
    return replace(of_merge(merge), gpu=0)


def of_segment(run: Run, shards: int = 1) -> Needs:
    """Of a run of layers whose end is kept, on all windows or on one of so many shards of them."""
    return resources.segment(geometry(run.origin, run.num_layers), len(run.layers), _pass(run, shards))


def of_score(run: Run, shards: int = 1) -> Needs:
    """Of a run of layers that ends in a score, on all windows or on one of so many shards of them."""
    sizes, how = geometry(run.origin, run.num_layers), _pass(run, shards)
    if run.keeps:
        return resources.dense_perplexity(sizes, how)
    return resources.perplexity(sizes, len(run.layers), how, compared=run.dense is not None)


def of_gathering(made: Run | TeacherStates | PrefixStates) -> Needs:
    """Of putting shards together: a batch of hidden states after another, read and written."""
    model = made.origin if isinstance(made, Run) else made.model
    windows = made.windows
    run = Pass(made.dtype, windows.seqlen, windows.count, made.batch_size, gpu=0)
    return resources.gather(geometry(model, made.num_layers), run)


def of_importance(experiment: Experiment) -> Needs:
    """Of ranking blocks of layers."""
    wanted = experiment.settings["importance"]
    run = Pass(wanted["dtype"], wanted["seqlen"], wanted["windows"])
    return resources.importance(geometry(experiment.model, experiment.layout.num_layers), run)


def of_choice(choice: Choice) -> Needs:
    """Of choosing layers by measurement."""
    run = Pass(choice.dtype, choice.windows.seqlen, choice.windows.count, choice.batch_size)
    sizes = geometry(choice.model, choice.num_layers)
    return resources.choice(sizes, choice.settings.amount(choice.num_layers), run)


def of_export(experiment: Experiment, stage: str) -> Needs:
    """Of writing a stage as one checkpoint."""
    layers = sum(len(experiment.layout.layers_of(part)) for part in PARTS_OF_STAGE[stage])
    return resources.export(geometry(experiment.model, experiment.layout.num_layers), layers)


def _pass(run: Run, shards: int) -> Pass:
    return Pass(run.dtype, run.windows.seqlen, _share(run.windows, shards, run.batch_size), run.batch_size)


def _share(windows: Windows, shards: int, batch_size: int = FROZEN_BATCH) -> int | None:
    """The windows of the largest of so many shards; None for those of a whole text, however long that is."""
    if windows.count is None:
        return None
    return min(windows.count, ceil(ceil(windows.count / batch_size) / shards) * batch_size)
