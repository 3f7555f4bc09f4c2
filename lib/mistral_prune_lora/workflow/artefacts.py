"""What the workflow makes, each named by what it is made from; equal work of several experiments is one artefact.

An artefact's name ends in a short key over its recipe: the names of the artefacts and the content of the given files
that it is made from, and the settings that decide its bytes. Another recipe is another name beside the former one, so
nothing that is there is ever out of date; only the code that makes it can be, and Snakemake compares that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from mistral_prune_lora.checkpoints.directories import BUNDLE_META, LAYERS_MAP, SINGLE_FILE, layer_file_name
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG
from mistral_prune_lora.distillation.schedule import passes_over
from mistral_prune_lora.distillation.settings import OptimiserSettings
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout, spans
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.workflow.content import short_key

SHARED = "results/shared"
MODEL_FILES = ("config.json", MANIFEST, LAYERS_MAP, PRUNE_LOG, SINGLE_FILE)


@dataclass(frozen=True)
class Source:
    """Something that jobs read: a model, a part or an adapter, made here or given.

    Attributes:
        folder: where it lies.
        depends: the files that a job depends on: of what is made here its record, which says what everything beside it
            holds; of what is given, all that is read.
        identity: its name, or the digest of what was given.
        given: whether it comes from outside.
        maker: the checkpoint that makes it; None for what is given or fetched.
        made: what that checkpoint calls it.
    """

    folder: str
    depends: tuple[str, ...]
    identity: str
    given: bool = False
    maker: str | None = None
    made: str = ""


def in_a_name(layers: Sequence[int]) -> str:
    """Layers as they stand in a rule's name: `12to15_18`; `none` for none."""
    return spans(layers, to="to", then="_") or "none"


def bundle_files(layers: Sequence[int]) -> tuple[str, ...]:
    """The files of a bundle directory."""
    return (BUNDLE_META, *map(layer_file_name, layers))


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, cut from a text or made of examples by a model's tokenizer.

    Attributes:
        model: whose tokenizer it is.
        dataset: the text, by the keys of `text.dataset_spec.DatasetSpec`.
        files: the local files it is read from.
        text: the identity of what those files hold.
        seqlen, count: the windows, or the examples in them; None takes the whole text.
        first: the first of them; those before it are somebody else's.
    """

    model: Source
    dataset: Mapping
    files: tuple[str, ...]
    text: str
    seqlen: int
    count: int | None
    first: int = 0

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/windows."""
        read = DatasetSpec.of(self.dataset).recipe
        recipe = {"model": self.model.identity, "text": self.text, **read, "seqlen": self.seqlen, "count": self.count}
        recipe |= {"first": self.first} if self.first else {}
        return f"{self.seqlen}-{short_key(recipe)}"

    @property
    def file(self) -> str:
        """Where they lie."""
        return f"{SHARED}/windows/{self.name}.safetensors"

    @property
    def record(self) -> str:
        """What they are, without the ids: another file only if they are others."""
        return f"{SHARED}/windows/{self.name}.json"

    @property
    def source(self) -> Source:
        """The windows as jobs read them."""
        return Source(f"{SHARED}/windows", (self.record,), self.name, maker="windows", made=self.name)


@dataclass(frozen=True)
class Pruning:
    """A model cut into A, B and C."""

    model: Source
    layout: Layout
    label: str

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/pruning."""
        recipe = {
            "model": self.model.identity,
            "layers": self.layout.num_layers,
            "b": self.layout.b,
            "c": self.layout.c,
        }
        return f"{self.label}-{short_key(recipe)}"

    @property
    def rule(self) -> str:
        """The rule that cuts: each choice of layers has files of other names, and so a rule of its own."""
        return f"prune_B{in_a_name(self.layout.b)}_C{in_a_name(self.layout.c)}"

    @property
    def root(self) -> str:
        """The directory of all parts."""
        return f"{SHARED}/pruning/{self.name}"

    def folder(self, part: str) -> str:
        """The directory of a part."""
        return f"{self.root}/A" if part == "A" else f"{self.root}/bundles/{part}"

    def files(self, part: str) -> list[str]:
        """The files of a part that are named in the rule; those of the tokenizer lie beside A's."""
        names = MODEL_FILES if part == "A" else bundle_files(self.layout.layers_of(part))
        return [f"{self.folder(part)}/{name}" for name in (*names, "prune.json")]

    @property
    def all_files(self) -> list[str]:
        """The files of all parts, A's first."""
        return [file for part in "ABC" for file in self.files(part)]

    def source(self, part: str) -> Source:
        """A part as jobs read it."""
        folder = self.folder(part)
        return Source(folder, (f"{folder}/prune.json",), f"{self.name}/{part}", maker=self.rule, made=self.name)


@dataclass(frozen=True)
class TeacherStates:
    """The dense model's hidden states of training windows.

    Attributes:
        model: the dense model.
        windows: the windows.
        dtype: of the states.
        num_layers: of the dense model.
        layer: which layer they leave; None for the final ones, after the norm.
    """

    model: Source
    windows: Windows
    dtype: str
    num_layers: int
    layer: int | None = None

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

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/prefix_states."""
        recipe = {
            "student": [self.student.identity, *(bundle.identity for bundle in self.bundles)],
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

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/adapters."""
        recipe = {
            "part": self.part,
            "student": [self.student.identity, *(bundle.identity for bundle in self.bundles)],
            "model": self.model.identity,
            "windows": self.data.windows.name,
            "teacher": self.data.teacher.name if self.data.teacher else None,
            "held_out": self.held_out.windows.name if self.held_out else None,
            "prefix": self.data.prefix.name if self.data.prefix else None,
            "settings": self.settings,
        }
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


@dataclass(frozen=True)
class Merge:
    """An adapter, merged into its part.

    Attributes:
        part: "A", "B" or "C".
        layers: that the part holds.
        base: the part before.
        adapter: what is merged.
        skeleton: for a bundle, the A model it belongs to.
        indices: how the adapter counts layers.
        output_dtype: of the weights; None keeps their own.
        dense: the dense model, whose sizes tell what the merge needs.
        num_layers: of the dense model.
    """

    part: str
    layers: tuple[int, ...]
    base: Source
    adapter: Source
    skeleton: Source | None
    indices: str
    output_dtype: str | None
    dense: Source
    num_layers: int

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/merged."""
        recipe = {
            "part": self.part,
            "base": self.base.identity,
            "adapter": self.adapter.identity,
            "skeleton": self.skeleton.identity if self.skeleton else None,
            "indices": self.indices,
            "output_dtype": self.output_dtype,
        }
        return f"{self.part}-{short_key(recipe)}"

    @property
    def rule(self) -> str:
        """The rule that merges; each choice of a bundle's layers has its own."""
        return "merge_A" if self.part == "A" else f"merge_{self.part}_{in_a_name(self.layers)}"

    @property
    def folder(self) -> str:
        """The merged part's directory."""
        return f"{SHARED}/merged/{self.name}/{self.part}_merged"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its files that are named in the rule."""
        return (*(MODEL_FILES if self.part == "A" else bundle_files(self.layers)), "merge.json")

    @property
    def files(self) -> list[str]:
        """Its files that are named in the rule."""
        return [f"{self.folder}/{name}" for name in self.names]

    @property
    def source(self) -> Source:
        """The merged part as jobs read it."""
        return Source(self.folder, (f"{self.folder}/merge.json",), self.name, maker=self.rule, made=self.name)


@dataclass(frozen=True)
class Run:
    """A run of layers on evaluation windows: a segment whose end is kept, or the tail of a stage with its score.

    Attributes:
        label: what it is called before its key: the segment, or the stage.
        model: the A model, merged or not, or the dense model.
        weights: the part that holds the layers.
        layers: original indices; none if a stage ends where its segment ends.
        source: the segment it starts from; None starts from the token ids.
        windows: what it runs on.
        batch_size, dtype: how.
        origin: the dense model that the parts are of, whose sizes tell what the run needs.
        num_layers: of the dense model.
        parts: every part that the stage has, for a score.
        dense: the dense model's score whose hidden states this one is compared with.
        keeps: whether a score keeps its final hidden states for others.
    """

    label: str
    model: Source
    weights: Source
    layers: tuple[int, ...]
    source: Run | None
    windows: Windows
    batch_size: int
    dtype: str
    origin: Source
    num_layers: int
    parts: tuple[Source, ...] = ()
    dense: Run | None = None
    keeps: bool = False

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/activations, or ppl."""
        recipe = {
            "label": self.label,
            "model": self.model.identity,
            "weights": self.weights.identity,
            "layers": self.layers,
            "source": self.source.name if self.source else None,
            "windows": self.windows.name,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "parts": [part.identity for part in self.parts],
            "dense": self.dense.name if self.dense else None,
        }
        return f"{self.label}-{short_key(recipe)}"

    @property
    def activations(self) -> str:
        """Where the hidden states at its end lie, if they are kept."""
        return f"{SHARED}/activations/{self.name}.safetensors"

    @property
    def result(self) -> str:
        """Where a score lies."""
        return f"{SHARED}/ppl/{self.name}.json"

    @property
    def window_scores(self) -> str:
        """Where the NLL of its windows lies."""
        return f"{SHARED}/ppl/{self.name}.parquet"

    @property
    def read(self) -> list[Source]:
        """Every part that the hidden states at its end, and its score, are made from."""
        way = [self.model, self.weights, *self.parts, *(self.source.read if self.source else ())]
        return list(dict.fromkeys(way))
