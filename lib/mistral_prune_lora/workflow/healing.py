"""What is made to heal parts: the dense model's states, those of a frozen prefix, and the adapters trained on them.

Named as all artefacts are, see `artefacts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import ClassVar

from mistral_prune_lora.distillation.schedule import FROZEN_BATCH, passes_over
from mistral_prune_lora.distillation.settings import OptimiserSettings
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE
from mistral_prune_lora.workflow.artefacts import SHARED, Run, Source, Windows, identities
from mistral_prune_lora.workflow.content import short_key

NO_KD = "no-kd"  # healed without a teacher
JOINT = {"joint-AB": "AB", "joint-FULL": "FULL"}  # all parts of a stage healed together


@dataclass(frozen=True)
class TeacherStates:
    """The dense model's hidden states of training windows.

    Attributes:
        model: the dense model.
        windows: the windows.
        dtype: of the states.
        num_layers: of the dense model.
        layer: which layer they leave; None for the final ones, after the norm.
        shards: how many jobs share the windows, which changes nothing of what is made.
    """

    model: Source
    windows: Windows
    dtype: str
    num_layers: int
    layer: int | None = None
    shards: int = field(default=1, compare=False)
    batch_size: ClassVar[int] = FROZEN_BATCH

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/teacher_states."""
        recipe = {"model": self.model.identity, "windows": self.windows.name, "dtype": self.dtype}
        return short_key(recipe | ({} if self.layer is None else {"layer": self.layer}))

    @property
    def file(self) -> str:
        """Where they lie."""
        return f"{SHARED}/teacher_states/{self.name}.safetensors"


@dataclass(frozen=True)
class PrefixStates:
    """What enters the first adapted layer of a student, of training windows.

    Attributes:
        student: the A model.
        bundles: those that are restored and have layers below the first.
        layers: all active layers below the first.
        first: the first adapted layer.
        windows: the windows.
        dtype: of the states.
        start: such states further below, of the same windows, to set out from.
        model: the dense model, whose sizes tell what the run needs.
        num_layers: of the dense model.
        shards: as for `TeacherStates`.
    """

    student: Source
    bundles: tuple[Source, ...]
    layers: tuple[int, ...]
    first: int
    windows: Windows
    dtype: str
    start: PrefixStates | None
    model: Source
    num_layers: int
    shards: int = field(default=1, compare=False)
    batch_size: ClassVar[int] = FROZEN_BATCH

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/prefix_states."""
        recipe = {
            "student": identities(self.student, *self.bundles),
            "layers": self.layers,
            "windows": self.windows.name,
            "dtype": self.dtype,
        }
        return short_key(recipe)

    @property
    def file(self) -> str:
        """Where they lie."""
        return f"{SHARED}/prefix_states/{self.name}.safetensors"


@dataclass(frozen=True)
class Reading:
    """Windows that a training reads, and what is stored of them.

    Attributes:
        windows: the windows.
        teacher, teacher_layer: the dense model's states where they are shared: the final ones, those of one layer.
        prefix: what enters the first adapted layer, where that is shared.
    """

    windows: Windows
    teacher: TeacherStates | None = None
    teacher_layer: TeacherStates | None = None
    prefix: PrefixStates | None = None


@dataclass(frozen=True)
class ClosedForm:
    """An adapter, computed in closed form.

    Attributes:
        part: "A", "B" or "C".
        student: the A model that it is for.
        bundles: what is restored into that.
        model: the dense model.
        texts: what it is calibrated on, each with its weight.
        num_layers: of the dense model.
        runs: how many layers it runs itself.
        settings: as the configuration has them, everything that decides the adapter's bytes.
        stations: of each text, the dense model's states that it reads, see `calibrating`; they change nothing of it.
    """

    part: str
    student: Source
    bundles: tuple[Source, ...]
    model: Source
    texts: tuple[tuple[Windows, float], ...]
    num_layers: int
    runs: int
    settings: Mapping = field(hash=False)
    stations: tuple[tuple[Run, ...], ...] = field(compare=False)

    names = ("adapter_config.json", "adapter_model.safetensors", "closed_form.json")

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/adapters."""
        recipe = {
            "part": self.part,
            "student": identities(self.student, *self.bundles),
            "model": self.model.identity,
            "texts": [[windows.name, weight] for windows, weight in self.texts],
            "settings": self.settings,
        }
        return f"{self.part}-closed-form-{short_key(recipe)}"

    @property
    def folder(self) -> str:
        """The adapter's directory."""
        return f"{SHARED}/adapters/{self.name}"

    @property
    def files(self) -> list[str]:
        """The files that are named in the rule."""
        return [f"{self.folder}/{name}" for name in self.names]

    @property
    def source(self) -> Source:
        """The adapter as jobs read it."""
        return Source(self.folder, (self.files[-1],), self.name, maker="closed_form", made=self.name)


@dataclass(frozen=True)
class Training:
    """An adapter, trained.

    Attributes:
        part: "A", "B" or "C"; "AB" or "FULL" for all parts of that stage together.
        student: the A model it is trained on.
        bundles: what is restored into that.
        model: the dense model.
        data: what it is trained on.
        held_out: what is looked at meanwhile; None for nothing.
        num_layers: of the dense model.
        active: how many layers the student runs.
        adapted: how many of them get an adapter.
        settings: as the configuration has them, everything that decides the adapter's bytes.
        running: the rest: save_steps, loggers.
        start: the adapter that it starts from; None for nothing.
    """

    part: str
    student: Source
    bundles: tuple[Source, ...]
    model: Source
    data: Reading
    held_out: Reading | None
    num_layers: int
    active: int
    adapted: int
    settings: Mapping = field(hash=False)
    running: Mapping = field(hash=False)
    start: ClosedForm | None = None

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/adapters."""
        recipe = {
            "part": self.part,
            "student": identities(self.student, *self.bundles),
            "model": self.model.identity,
            "windows": self.data.windows.name,
            "teacher": self.data.teacher.name if self.data.teacher else None,
            "held_out": self.held_out.windows.name if self.held_out else None,
            "prefix": self.data.prefix.name if self.data.prefix else None,
            "settings": self.settings,
        }
        recipe |= {"start": self.start.name} if self.start else {}
        return f"{self.part}-{short_key(recipe)}"

    @property
    def parts(self) -> str:
        """The parts that get an adapter."""
        return "".join(PARTS_OF_STAGE.get(self.part, self.part))

    @property
    def rule(self) -> str:
        """The rule that trains; parts that are trained together have files of other names."""
        return "train_adapter" if len(self.parts) == 1 else f"train_joint_{self.part}"

    @property
    def passes(self) -> float:
        """How often each window is trained on; infinity if their number is not known here."""
        count, optimiser = self.data.windows.count, OptimiserSettings(**self.settings["optimiser"])
        return passes_over(count, optimiser) if count else inf

    @property
    def folder(self) -> str:
        """The adapter's directory."""
        return f"{SHARED}/adapters/{self.name}"

    @property
    def files(self) -> list[str]:
        """The files that are named in the rule."""
        return [f"{self.folder}/{name}" for name in self.names]

    @property
    def names(self) -> list[str]:
        """Their names in the folder."""
        weights = ("adapter_config.json", "adapter_model.safetensors")
        folders = [""] if len(self.parts) == 1 else [f"{part}_lora/" for part in self.parts]
        return [*(f"{folder}{name}" for folder in folders for name in weights), "training.csv", "training.json"]

    @property
    def readings(self) -> list[Reading]:
        """Everything that it reads windows from."""
        return [reading for reading in (self.data, self.held_out) if reading]

    def source(self, part: str) -> Source:
        """The adapter of a part as jobs read it."""
        if len(self.parts) == 1:
            folder = self.folder
            depends: tuple[str, ...] = (f"{folder}/training.json",)
        else:
            # The record lies above, and a job finds the directory by what it depends on.
            folder = f"{self.folder}/{part}_lora"
            depends = (f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors")
        return Source(folder, depends, f"{self.name}/{part}", maker=self.rule, made=self.name)


def optimiser(distill: Mapping, parts: str) -> tuple[dict, list[int] | None]:
    """The optimiser's settings, as the configuration has them, and which layers are adapted; None for all.

    Of parts that are trained together, A's settings with as many updates as all of them have apart.
    """
    own = [distill["parts"][part] for part in parts]
    settings = {key: value for key, value in own[0].items() if key != "adapt_layers"}
    for key in ("steps", "warmup_steps"):
        settings[key] = sum(each[key] for each in own)
    if len(own) > 1 or own[0]["adapt_layers"] == "all":
        return settings, None
    return settings, own[0]["adapt_layers"]


def look(held_out: Mapping | None) -> dict | None:
    """What is done with held-out windows, as the training takes it."""
    return None if held_out is None else {key: held_out[key] for key in ("eval_steps", "keep", "patience")}
