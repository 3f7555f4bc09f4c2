"""One experiment of the configuration: what is made for it, and what from. The disk is asked about given files only.

Nothing here knows of Snakemake: rules look up what a job reads and writes, and tests can do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.workflow.artefacts import Merge, Pruning, Run, Source, Windows
from mistral_prune_lora.workflow.calibrating import dense_way, layers_run, stations_of
from mistral_prune_lora.workflow.chosen import Chosen, choice_file
from mistral_prune_lora.workflow.configuration import (
    calibration_texts,
    closed_form_parts,
    experiment_layout,
    merged_parts,
    started_parts,
    trained_parts,
)
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.given import dense_model, given_adapter, given_part, text_files, text_identity
from mistral_prune_lora.workflow.healing import (
    JOINT,
    NO_KD,
    ClosedForm,
    PrefixStates,
    Reading,
    TeacherStates,
    Training,
    look,
    optimiser,
)
from mistral_prune_lora.workflow.measuring import Measuring
from mistral_prune_lora.workflow.once import once
from mistral_prune_lora.workflow.restoring import CLOSED_FORM, EXACT, SHARED, TRAIN, undone_part

# Settings of a training that decide its bytes, by the configuration's keys.
_DECIDING = ("dtype", "seed", "gradient_checkpointing", "lora", "loss", "skip_spikes", "teacher_4bit")


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: its folder is results/<name>.
        settings: its part of the checked configuration.
        layout: the layers of A, B and C.
        model: the dense model.
        datasets: the configuration's texts, by name.
        content: what given files hold.
    """

    name: str
    settings: Mapping = field(repr=False)
    layout: Layout
    model: Source
    datasets: Mapping[str, Mapping] = field(repr=False)
    content: Content = field(repr=False)
    _answers: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, config: Mapping, name: str, content: Content) -> Experiment:
        """An experiment of a checked configuration.

        Raises:
            PipelineError: given files cannot be read, or contradict each other.
        """
        settings = config["experiments"][name]
        model = dense_model(settings["model"], config["models"][settings["model"]], content)
        if file := choice_file(settings):
            Chosen.read(file).check_model(model, content)
        return cls(name, settings, experiment_layout(config, name), model, config["datasets"], content)

    @property
    def folder(self) -> str:
        """Where its results lie."""
        return f"results/{self.name}"

    @cached_property
    def pruning(self) -> Pruning | None:
        """The pruning that is made for it; None where it is given, or nothing but the dense model is measured."""
        if "pruned" in self.settings or set(self.variants) == {"dense"}:
            return None
        return Pruning(self.model, self.layout, self.settings["model"])

    @cached_property
    def variants(self) -> list[str]:
        """What is measured: the dense model, the parts before and after healing, and those healed otherwise."""
        return [*self.settings["perplexity"]["variants"], *self.settings["baselines"]]

    @cached_property
    def merged_parts(self) -> list[str]:
        """The parts whose adapters are merged."""
        return merged_parts(self.settings, self.layout)

    @cached_property
    def trained_parts(self) -> list[str]:
        """The merged parts whose adapters are trained."""
        return trained_parts(self.settings, self.layout)

    @once
    def windows(self, purpose: str, dataset: str) -> Windows:
        """The windows of a text for "perplexity", "distill" or "importance"."""
        wanted = self.settings[purpose]
        return self._windows(dataset, wanted["seqlen"], wanted["windows"])

    def _windows(self, dataset: str, seqlen: int, count: int | None) -> Windows:
        settings = self.datasets[dataset]
        identity = text_identity(settings, self.content)
        return Windows(self.model, settings, text_files(settings), identity, seqlen, count)

    @once
    def part(self, variant: str, part: str) -> Source:
        """A part of the pruned or the merged model; of the dense model, itself."""
        if variant == "dense":
            return self.model
        if variant in JOINT or (variant != "pruned" and self._is_merged(part)):
            return self.merge(part, variant).source
        if self.pruning:
            return self.pruning.source(part)
        return given_part(self.settings["pruned"], part, self.layout, self.content)

    def _is_merged(self, part: str) -> bool:
        return self.settings["adapters"][part] is not None or undone_part(self.settings, self.layout, part) is not None

    @once
    def parts(self, variant: str, parts: str) -> tuple[Source, ...]:
        """Those of some parts that hold layers."""
        return tuple(self.part(variant, part) for part in parts if self.layout.layers_of(part))

    @cached_property
    def trainings(self) -> list[Training]:
        """All trainings: of the parts that are healed, and of what they are compared with."""
        own = [self.training(part) for part in self.trained_parts]
        parts = [part for part in "ABC" if self.layout.layers_of(part)]
        plain = [part for part in parts if self.settings["adapters"][part] == TRAIN]
        without = [self.training(part, NO_KD) for part in plain if NO_KD in self.variants]
        return own + without + [self.training(stage, v) for v, stage in JOINT.items() if v in self.variants]

    @cached_property
    def started_parts(self) -> list[str]:
        """The trained parts whose training starts from an adapter in closed form."""
        return started_parts(self.settings, self.layout)

    @cached_property
    def closed_form_parts(self) -> list[str]:
        """The merged parts whose adapters are computed in closed form."""
        return closed_form_parts(self.settings, self.layout)

    @cached_property
    def closed_forms(self) -> list[ClosedForm]:
        """All adapters in closed form: merged, or started from."""
        variants = [variant for variant in ("merged", NO_KD) if variant in self.variants]
        made = [self.closed_form(part, variant) for part in self.closed_form_parts for variant in variants]
        return made + [training.start for training in self.trainings if training.start]

    @property
    def training_labels(self) -> list[str]:
        """What each of the trainings is called."""
        taught = {training.name for training in (self.training(part) for part in self.trained_parts)}
        return [
            training.part if training.name in taught or len(training.parts) > 1 else f"{training.part} without KD"
            for training in self.trainings
        ]

    @once
    def training(self, trained: str, variant: str = "merged") -> Training:
        """A training: of A's adapter on the pruned A; of B's on A_merged with B restored, of C's on both merged.

        Args:
            trained: the part; of a variant that trains all parts of a stage together, that stage.
            variant: "merged", or what that is compared with.
        """
        wanted = self.settings["distill"]
        parts = "".join(PARTS_OF_STAGE.get(trained, trained))
        student, bundles = self._student(trained, parts, variant)
        settings = {key: wanted[key] for key in _DECIDING}
        if shared := trained == "A" and self.settings["restore"] == SHARED:
            bundles = {part: self.part("pruned", part) for part in "BC" if self.layout.layers_of(part)}
            settings["stages"] = wanted["stages"]
        # What a training is compared with starts from nothing.
        start = self.closed_form(trained) if trained in self.started_parts and variant == "merged" else None
        if variant == NO_KD:
            settings["loss"] = {**wanted["loss"], "kd_alpha": 0.0, "hidden": None}
        settings["optimiser"], settings["adapt_layers"] = optimiser(wanted, parts)
        taught = bool(settings["loss"]["kd_alpha"] or settings["loss"]["hidden"])
        layers = [layer for part in parts for layer in self.layout.layers_of(part)]
        adapted = [layer for layer in layers if settings["adapt_layers"] is None or layer in settings["adapt_layers"]]
        active = [layer for part in ("A", *bundles) for layer in self.layout.layers_of(part)]
        first = 0 if shared else min(adapted, default=0)  # below it, every stage comes to something else
        prefix = tuple(layer for layer in sorted(active) if layer < first)
        held = self._held_out_windows()
        data = self._reading(self.windows("distill", wanted["dataset"]), taught, student, bundles, prefix)
        return Training(
            trained,
            student,
            tuple(bundles.values()),
            self.model,
            data,
            None if held is None else self._reading(held, taught, student, bundles, prefix, looked=True),
            self.layout.num_layers,
            len(active),
            len(adapted),
            settings | {"held_out": look(wanted["held_out"])},
            {"save_steps": wanted["save_steps"], "loggers": wanted["loggers"]},
            start,
        )

    @once
    def closed_form(self, part: str, variant: str = "merged") -> ClosedForm:
        """An adapter in closed form, on the student that a part's adapter is trained on."""
        wanted, (student, bundles) = self.settings["closed_form"], self._student(part, part, variant)
        texts = calibration_texts(self.settings)
        windows = tuple((self._calibration_windows(text), weight) for text, weight in texts.items())
        decides = ("held_out", "rank", "ridge", "layers_behind", "token_weights", "dtype", "batch_size")
        settings = {key: wanted[key] for key in decides}
        restored = tuple(bundles.values())
        unhealed = all(each == self.part("pruned", name) for name, each in {"A": student, **bundles}.items())
        read = stations_of(self.layout, part, unhealed=unhealed)
        stations = tuple(tuple(self._dense_way(text)[end] for end in read) for text in texts)
        runs = layers_run(self.layout, part, wanted["layers_behind"], unhealed=unhealed)
        return ClosedForm(
            part, student, restored, self.model, windows, self.layout.num_layers, runs, settings, stations
        )

    @once
    def _dense_way(self, text: str) -> dict[int, Run]:
        """The dense model's segments on a text's calibration windows."""
        wanted, shards = self.settings["closed_form"], self.settings["distill"]["shards"]
        how = (wanted["batch_size"], wanted["dtype"], shards)
        return dense_way(self.model, self.layout, self._calibration_windows(text), *how)

    def _calibration_windows(self, text: str) -> Windows:
        wanted = self.settings["closed_form"]
        return self._windows(text, wanted["seqlen"], wanted["windows"] + wanted["held_out"])

    def _student(self, trained: str, parts: str, variant: str) -> tuple[Source, dict[str, Source]]:
        """What a part's adapter is made for, or that of all parts of a stage: the A model, and bundles by part."""
        before = "" if len(parts) > 1 else "ABC"[: "ABC".index(trained)]
        if self.settings["restore"] == EXACT:
            variant = "pruned"  # what was healed before is undone once the part is there
        student = self.part(variant if before else "pruned", "A")
        restored = [part for part in (parts if len(parts) > 1 else before + trained) if part != "A"]
        bundles = {
            part: self.part(variant if part in before else "pruned", part)
            for part in restored
            if self.layout.layers_of(part)
        }
        return student, bundles

    def _held_out_windows(self) -> Windows | None:
        held = self.settings["distill"]["held_out"]
        if held is None:
            return None
        trained = self.windows("distill", self.settings["distill"]["dataset"])
        if held["dataset"] is None:
            return replace(trained, first=trained.count or 0, count=held["windows"])
        return self._windows(held["dataset"], trained.seqlen, held["windows"])

    def _reading(
        self,
        windows: Windows,
        taught: bool,
        student: Source,
        bundles: Mapping[str, Source],
        prefix: tuple[int, ...],
        looked: bool = False,
    ) -> Reading:
        wanted, hidden = self.settings["distill"], self.settings["distill"]["loss"]["hidden"]
        states = layer = None
        if taught and wanted["share_teacher_states"]:
            how = (wanted["dtype"], self.layout.num_layers)
            states = TeacherStates(self.model, windows, *how, shards=wanted["shards"])
            layer = replace(states, layer=hidden["teacher_layer"]) if hidden and not looked else None
        shared = wanted["share_prefix_states"] and prefix
        entering = self._prefix(windows, student, bundles, prefix) if shared else None
        return Reading(windows, states, layer, entering)

    def _prefix(
        self, windows: Windows, student: Source, bundles: Mapping[str, Source], layers: tuple[int, ...]
    ) -> PrefixStates:
        """What enters the layer behind some layers; it sets out from what the layers of A alone come to, if those are
        the first of them: the prefix of B, which C's goes on from."""
        own = set(self.layout.layers_of("A"))
        below = [bundle for part, bundle in bundles.items() if set(self.layout.layers_of(part)) & set(layers)]
        start = None
        lead = next((n for n, layer in enumerate(layers) if layer not in own), len(layers))
        if below and lead:
            start = self._prefix(windows, student, {}, layers[:lead])
        last = layers[-1] + 1
        how = (windows, self.settings["distill"]["dtype"], start, self.model, self.layout.num_layers)
        return PrefixStates(student, tuple(below), layers, last, *how, self.settings["distill"]["shards"])

    def made_adapter(self, part: str) -> Training | ClosedForm:
        """A part's adapter that is made here."""
        return self.training(part) if part in self.trained_parts else self.closed_form(part)

    def adapter(self, part: str, variant: str = "merged") -> Source | None:
        """A part's adapter: the given one, or the one that is made; None where a part is to have none."""
        if variant in JOINT:
            return self.training(JOINT[variant], variant).source(part)
        source = self.settings["adapters"][part]
        if source == TRAIN:
            return self.training(part, variant).source(part)
        if source == CLOSED_FORM:
            return self.closed_form(part, variant).source
        return None if source is None else given_adapter(source, self.content)

    @once
    def merge(self, part: str, variant: str = "merged") -> Merge:
        """The merge of a part's adapter."""
        base, skeleton = self.part("pruned", part), None if part == "A" else self.part("pruned", "A")
        given = self.settings["adapters"][part] not in (TRAIN, CLOSED_FORM) and variant not in JOINT
        indices = self.settings["adapter_indices"] if part == "A" and given else "original"
        dtype = self.settings["merge"]["output_dtype"]
        layers, adapter, count = self.layout.layers_of(part), self.adapter(part, variant), self.layout.num_layers
        undone = None if variant in JOINT else undone_part(self.settings, self.layout, part)
        undoes = (self.part("pruned", undone), self.part(variant, undone)) if undone else ()
        return Merge(part, layers, base, adapter, skeleton, indices, dtype, self.model, count, undoes)

    @cached_property
    def merges(self) -> list[Merge]:
        """All merges: of the healed parts, and of those that they are compared with."""
        return list(self.labelled_merges.values())

    @cached_property
    def labelled_merges(self) -> dict[tuple[str, str], Merge]:
        """All merges by variant and part."""
        own = {("merged", part): self.merge(part) for part in self.merged_parts}
        for variant in self.settings["baselines"]:
            joint = variant in JOINT
            parts = PARTS_OF_STAGE[JOINT[variant]] if joint else filter(self._is_merged, "ABC")
            own |= {(variant, part): self.merge(part, variant) for part in parts if self.layout.layers_of(part)}
        return own

    @cached_property
    def measuring(self) -> Measuring:
        """What measures it."""
        return Measuring(self)

    @cached_property
    def files(self) -> list[str]:
        """What its folder holds when all is done."""
        placed = []
        if self.pruning:
            root = self.pruning.root
            placed += [f"{self.folder}/pruning{file.removeprefix(root)}" for file in self.pruning.all_files]
        for part in self.trained_parts:
            names = [file.rsplit("/", 1)[1] for file in self.training(part).files]
            placed += [f"{self.folder}/adapters/{part}_lora/{name}" for name in names]
        for part in self.closed_form_parts:
            placed += [f"{self.folder}/adapters/{part}_lora/{name}" for name in ClosedForm.names]
        for part in self.merged_parts:
            placed += [f"{self.folder}/merged/{part}_merged/{name}" for name in self.merge(part).names]
        if self.trainings:
            placed.append(f"{self.folder}/training.svg")
        for dataset, variant, stage in self.measuring.scores():
            placed += [f"{self.folder}/ppl/{dataset}/{variant}.{stage}.{kind}" for kind in ("json", "parquet")]
        return placed
