"""Everything that a configuration asks for: the artefacts of all experiments, each of them once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from mistral_prune_lora.workflow.artefacts import Merge, Pruning, Run, Windows
from mistral_prune_lora.workflow.choice import Choice, choices
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.experiment import Experiment
from mistral_prune_lora.workflow.healing import ClosedForm, PrefixStates, TeacherStates, Training


@dataclass(frozen=True)
class Plan:
    """The artefacts of all experiments, by their names, which are the rules' wildcards.

    Attributes:
        experiments: by name.
        prunings, windows, teachers, prefixes, trainings, closed_forms, merges: as the workflow makes them.
        segments: runs whose boundary activations others start from.
        scores: runs that end in a score.
        choices: of layers, on request.
    """

    experiments: dict[str, Experiment]
    prunings: dict[str, Pruning] = field(default_factory=dict)
    windows: dict[str, Windows] = field(default_factory=dict)
    teachers: dict[str, TeacherStates] = field(default_factory=dict)
    prefixes: dict[str, PrefixStates] = field(default_factory=dict)
    trainings: dict[str, Training] = field(default_factory=dict)
    closed_forms: dict[str, ClosedForm] = field(default_factory=dict)
    merges: dict[str, Merge] = field(default_factory=dict)
    segments: dict[str, Run] = field(default_factory=dict)
    scores: dict[str, Run] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping, content: Content, chosen: Mapping[str, Choice] | None = None) -> Plan:
        """The plan of a checked configuration.

        Args:
            config: the configuration.
            content: what given files hold.
            chosen: the choices of layers that there are, also those of experiments that still wait for theirs; None
                takes those of the configuration.

        Raises:
            PipelineError: given files cannot be read, or contradict each other.
        """
        plan = cls({name: Experiment.of(config, name, content) for name in config["experiments"]})
        for experiment in plan.experiments.values():
            plan._add(experiment)
        for choice in (choices(config, content) if chosen is None else chosen).values():
            _put(plan.choices, [choice])
            _put(plan.windows, [choice.windows])
        return plan

    def _add(self, experiment: Experiment) -> None:
        if experiment.pruning:
            _put(self.prunings, [experiment.pruning])
        _put(self.trainings, experiment.trainings)
        for reading in (reading for training in experiment.trainings for reading in training.readings):
            _put(self.windows, [reading.windows])
            _put(self.teachers, filter(None, [reading.teacher, reading.teacher_layer]))
            prefix = reading.prefix
            while prefix:
                _put(self.prefixes, [prefix])
                prefix = prefix.start
        _put(self.closed_forms, experiment.closed_forms)
        _put(self.windows, [windows for made in experiment.closed_forms for windows, _ in made.texts])
        stations = (run for made in experiment.closed_forms for runs in made.stations for run in runs)
        _put(self.segments, (run for station in stations for run in station.way))
        _put(self.merges, experiment.merges)
        for (dataset, variant, _), score in experiment.measuring.scores().items():
            _put(self.scores, [score, *([score.dense] if score.dense else [])])
            _put(self.windows, [score.windows])
            _put(self.segments, experiment.measuring.shared_runs(variant, dataset))
        if experiment.settings["importance"]["dataset"]:
            _put(self.windows, [experiment.windows("importance", experiment.settings["importance"]["dataset"])])

    @property
    def adapters(self) -> list[Training | ClosedForm]:
        """Every adapter that is made here."""
        return [*self.trainings.values(), *self.closed_forms.values()]

    @property
    def files(self) -> list[str]:
        """Every file in results/shared that is to be there when all is done, and those of fetched models."""
        models = {e.model.folder: e.model for e in self.experiments.values() if not e.model.given}
        read = [reading.windows for training in self.trainings.values() for reading in training.readings]
        read += [windows for made in self.closed_forms.values() for windows, _ in made.texts]
        windows = {cut.name: cut for cut in (*read, *(score.windows for score in self.scores.values()))}
        return [
            *(file for model in models.values() for file in model.depends),
            *(file for cut in windows.values() for file in (cut.file, cut.record)),
            *(file for pruning in self.prunings.values() for file in pruning.all_files),
            *(file for made in self.adapters for file in made.files),
            *(file for merge in self.merges.values() for file in merge.files),
            *(file for score in self.scores.values() for file in (score.result, score.window_scores)),
        ]

    @property
    def names(self) -> list[str]:
        """What stands for an artefact in the name of a job: of everything made, of models and of experiments."""
        models = {e.settings["model"] for e in self.experiments.values()}
        return sorted({*models, *(name for kind in fields(self) for name in getattr(self, kind.name))})

    @property
    def paths(self) -> list[str]:
        """Everything in results/shared that is asked for, on request too: directories and files."""
        runs = [run.activations for run in (*self.segments.values(), *self.scores.values())]
        return [
            *(pruning.root for pruning in self.prunings.values()),
            *(made.folder for made in self.adapters),
            *(f"{made.folder}.unfinished" for made in self.adapters),
            *(merge.folder.rsplit("/", 1)[0] for merge in self.merges.values()),
            *(merge.strength for merge in self.merges.values()),
            *(file for cut in self.windows.values() for file in (cut.file, cut.record)),
            *(states.file for states in self.teachers.values()),
            *(states.file for states in self.prefixes.values()),
            *(file for score in self.scores.values() for file in (score.result, score.window_scores)),
            *runs,
            *(path for choice in self.choices.values() for path in (choice.folder, choice.journal)),
        ]


def _put(into: dict, artefacts: Iterable) -> None:
    for artefact in artefacts:
        into.setdefault(artefact.name, artefact)
