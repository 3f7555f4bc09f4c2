"""What the workflow makes, each named by what it is made from; equal work of several experiments is one artefact.

An artefact's name ends in a short key over its recipe: the names of the artefacts and the content of the given files
that it is made from, and the settings that decide its bytes. Another recipe is another name beside the former one, so
nothing that is there is ever out of date; only the code that makes it can be, and Snakemake compares that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mistral_prune_lora.checkpoints.directories import BUNDLE_META, LAYERS_MAP, SINGLE_FILE, layer_file_name
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG
from mistral_prune_lora.checkpoints.undo import UNDO_FILE
from mistral_prune_lora.layout.partition import Layout, spans
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


def identities(*sources: Source) -> list[str]:
    """Of several things that jobs read, for a recipe."""
    return [source.identity for source in sources]


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
class Merge:
    """An adapter, merged into its part.

    Attributes:
        part: "A", "B" or "C".
        layers: that the part holds.
        base: the part before.
        adapter: what is merged; None for a bundle that only puts something back.
        skeleton: for a bundle, the A model it belongs to.
        indices: how the adapter counts layers.
        output_dtype: of the weights; None keeps their own.
        dense: the dense model, whose sizes tell what the merge needs.
        num_layers: of the dense model.
        undoes: the part that restoring this bundle puts back, before and after its merge.
    """

    part: str
    layers: tuple[int, ...]
    base: Source
    adapter: Source | None
    skeleton: Source | None
    indices: str
    output_dtype: str | None
    dense: Source
    num_layers: int
    undoes: tuple[Source, ...] = ()

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/merged."""
        recipe: dict[str, object] = {
            "part": self.part,
            "base": self.base.identity,
            "adapter": self.adapter.identity if self.adapter else None,
            "skeleton": self.skeleton.identity if self.skeleton else None,
            "indices": self.indices,
            "output_dtype": self.output_dtype,
        }
        recipe |= {"undoes": identities(*self.undoes)} if self.undoes else {}
        return f"{self.part}-{short_key(recipe)}"

    @property
    def rule(self) -> str:
        """The rule that merges; each choice of a bundle's layers has its own."""
        if self.part == "A":
            return "merge_A"
        return f"merge_{self.part}_{in_a_name(self.layers)}{'_undo' if self.undoes else ''}"

    @property
    def folder(self) -> str:
        """The merged part's directory."""
        return f"{SHARED}/merged/{self.name}/{self.part}_merged"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its files that are named in the rule."""
        undo = (UNDO_FILE,) if self.undoes else ()
        return (*(MODEL_FILES if self.part == "A" else bundle_files(self.layers)), *undo, "merge.json")

    @property
    def files(self) -> list[str]:
        """Its files that are named in the rule."""
        return [f"{self.folder}/{name}" for name in self.names]

    @property
    def strength(self) -> str:
        """Where it is told how much the adapter changes each weight."""
        return f"{SHARED}/strength/{self.name}.csv"

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
        restores: every part of the stage, where its bundles put original weights back in the layers that are run.
        shards: how many jobs share its windows, which changes nothing of what is made.
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
    restores: tuple[Source, ...] = ()
    shards: int = field(default=1, compare=False)

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
            "parts": identities(*self.parts),
            "dense": self.dense.name if self.dense else None,
        }
        recipe |= {"restores": identities(*self.restores)} if self.restores else {}
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
    def way(self) -> list[Run]:
        """The runs that lead to its end, itself the last."""
        return [*(self.source.way if self.source else ()), self]

    @property
    def read(self) -> list[Source]:
        """Every part that the hidden states at its end, and its score, are made from."""
        way = [self.model, self.weights, *self.parts, *self.restores, *(self.source.read if self.source else ())]
        return list(dict.fromkeys(way))
