"""What the job of each artefact needs, by the sizes of the model that it is made from."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from mistral_prune_lora.layout.partition import PARTS_OF_STAGE
from mistral_prune_lora.workflow import resources
from mistral_prune_lora.workflow.artefacts import Merge, Pruning, Run, Source
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


def of_teacher(states: TeacherStates) -> Needs:
    """Of the dense model's pass over the training windows."""
    run = Pass(states.dtype, states.windows.seqlen, states.windows.count)
    return resources.teacher_states(geometry(states.model, states.num_layers), run)


def of_prefix(states: PrefixStates) -> Needs:
    """Of the frozen layers' pass over the training windows."""
    run = Pass(states.dtype, states.windows.seqlen, states.windows.count)
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
    return resources.closed_form(geometry(made.model, made.num_layers), made.active, run)


def of_merge(merge: Merge) -> Needs:
    """Of merging an adapter."""
    return resources.merge(geometry(merge.dense, merge.num_layers), len(merge.layers), ends=merge.part == "A")


def of_strength(merge: Merge) -> Needs:
    """Of reading an adapter and the weights that it is for: as much as a merge, and no GPU."""
    return replace(of_merge(merge), gpu=0)


def of_segment(run: Run) -> Needs:
    """Of a run of layers whose end is kept."""
    return resources.segment(geometry(run.origin, run.num_layers), len(run.layers), _pass(run))


def of_score(run: Run) -> Needs:
    """Of a run of layers that ends in a score."""
    sizes = geometry(run.origin, run.num_layers)
    if run.keeps:
        return resources.dense_perplexity(sizes, _pass(run))
    return resources.perplexity(sizes, len(run.layers), _pass(run), compared=run.dense is not None)


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


def _pass(run: Run) -> Pass:
    return Pass(run.dtype, run.windows.seqlen, run.windows.count, run.batch_size)
