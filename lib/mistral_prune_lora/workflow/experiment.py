"""One experiment of the configuration: what is made for it, and what from. The disk is asked about given files only.

Nothing here knows of Snakemake: rules look up what a job reads and writes, and tests can do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps

from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.layout.segments import Segment, segment_tree, shared_segments, stage_run
from mistral_prune_lora.workflow.artefacts import Merge, Pruning, Run, Source, TeacherStates, Training, Windows
from mistral_prune_lora.workflow.configuration import experiment_layout, merged_parts, trained_parts
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.given import dense_model, given_adapter, given_part, text_files, text_identity


def _once(method: Callable) -> Callable:
    """A method that answers the same question once: names are digests over digests, and rules ask for them often."""

    @wraps(method)
    def answer(self, *question):
        known = self._answers
        if (method.__name__, question) not in known:
            known[method.__name__, question] = method(self, *question)
        return known[method.__name__, question]

    return answer


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
        return cls(name, settings, experiment_layout(config, name), model, config["datasets"], content)

    @property
    def folder(self) -> str:
        """Where its results lie."""
        return f"results/{self.name}"

    @cached_property
    def pruning(self) -> Pruning | None:
        """The pruning that is made for it; None where it is given, or nothing but the dense model is measured."""
        measured = self.settings["perplexity"]["variants"]
        if "pruned" in self.settings or set(measured) == {"dense"}:
            return None
        return Pruning(self.model, self.layout, self.settings["model"])

    @cached_property
    def merged_parts(self) -> list[str]:
        """The parts whose adapters are merged."""
        return merged_parts(self.settings, self.layout)

    @cached_property
    def trained_parts(self) -> list[str]:
        """The merged parts whose adapters are trained."""
        return trained_parts(self.settings, self.layout)

    @_once
    def windows(self, purpose: str, dataset: str) -> Windows:
        """The windows of a text for "perplexity", "distill" or "importance"."""
        settings, wanted = self.datasets[dataset], self.settings[purpose]
        identity = text_identity(settings, self.content)
        return Windows(self.model, settings, text_files(settings), identity, wanted["seqlen"], wanted["windows"])

    @_once
    def part(self, variant: str, part: str) -> Source:
        """A part of the pruned or the merged model; of the dense model, itself."""
        if variant == "dense":
            return self.model
        if variant == "merged":
            return self.merge(part).source
        if self.pruning:
            return self.pruning.source(part)
        return given_part(self.settings["pruned"], part, self.layout, self.content)

    @_once
    def parts(self, variant: str, parts: str) -> tuple[Source, ...]:
        """Those of some parts that hold layers."""
        return tuple(self.part(variant, part) for part in parts if self.layout.layers_of(part))

    @cached_property
    def teacher(self) -> TeacherStates | None:
        """The teacher's states that training shares; None where the teacher runs along."""
        wanted = self.settings["distill"]
        if not self.trained_parts or not wanted["share_teacher_states"]:
            return None
        windows = self.windows("distill", wanted["dataset"])
        return TeacherStates(self.model, windows, wanted["dtype"], self.layout.num_layers)

    @_once
    def training(self, part: str) -> Training:
        """The training of a part's adapter: B's on A_merged with B restored, C's on A_merged and B_merged with C."""
        wanted = self.settings["distill"]
        student = self.part("pruned" if part == "A" else "merged", "A")
        bundles = (*(self.parts("merged", "B") if part == "C" else ()), *self.parts("pruned", part.replace("A", "")))
        settings = {key: wanted[key] for key in ("dtype", "seed", "gradient_checkpointing", "lora", "loss")}
        settings["optimiser"] = wanted["parts"][part]
        windows = self.windows("distill", wanted["dataset"])
        count = self.layout.num_layers
        active = sum(len(self.layout.layers_of(each)) for each in "ABC"[: "ABC".index(part) + 1])
        adapted = len(self.layout.layers_of(part))
        return Training(part, student, bundles, self.model, windows, self.teacher, count, active, adapted, settings)

    def adapter(self, part: str) -> Source:
        """A part's adapter: the given one, or the one that is trained."""
        source = self.settings["adapters"][part]
        return self.training(part).source if source == "train" else given_adapter(source, self.content)

    @_once
    def merge(self, part: str) -> Merge:
        """The merge of a part's adapter."""
        base, skeleton = self.part("pruned", part), None if part == "A" else self.part("pruned", "A")
        indices = self.settings["adapter_indices"] if part == "A" else "original"
        dtype = self.settings["merge"]["output_dtype"]
        layers, adapter, count = self.layout.layers_of(part), self.adapter(part), self.layout.num_layers
        return Merge(part, layers, base, adapter, skeleton, indices, dtype, self.model, count)

    @_once
    def tree(self, variant: str) -> list[Segment]:
        """The segments of one variant; the dense model is a single one."""
        if variant == "dense":
            return segment_tree(Layout(self.layout.num_layers), ("FULL",))
        return segment_tree(self.layout, self.stages(variant))

    def stages(self, variant: str) -> list[str]:
        """The stages that one variant is measured at."""
        return ["FULL"] if variant == "dense" else self.settings["perplexity"]["stages"]

    @_once
    def segment(self, variant: str, dataset: str, name: str) -> Run:
        """The run of a segment that others start from."""
        segment = next(s for s in self.tree(variant) if s.name == name)
        source = self.segment(variant, dataset, segment.parent) if segment.parent else None
        return self._run(segment.name, variant, dataset, segment.part, segment.layers, source)

    def shared_runs(self, variant: str, dataset: str) -> list[Run]:
        """The runs of all segments that others start from."""
        if variant == "dense":
            return []
        return [self.segment(variant, dataset, s.name) for s in shared_segments(self.tree(variant))]

    @_once
    def score(self, variant: str, dataset: str, stage: str) -> Run:
        """The score of a stage: the dense model's, or that of a stage's tail."""
        compared = self.settings["perplexity"]["compare_with_dense"]
        if variant == "dense":
            layers = tuple(range(self.layout.num_layers))
            return self._run("dense", variant, dataset, "A", layers, None, keeps=True)
        start, tail = stage_run(self.tree(variant), stage)
        return self._run(
            stage,
            variant,
            dataset,
            tail.part if tail else "A",
            tail.layers if tail else (),
            self.segment(variant, dataset, start) if start else None,
            parts=self.parts(variant, PARTS_OF_STAGE[stage]),
            dense=self.score("dense", dataset, "FULL") if compared else None,
        )

    @_once
    def scores(self) -> dict[tuple[str, str, str], Run]:
        """Every score that makes a row of the summary, by (dataset, variant, stage)."""
        wanted = self.settings["perplexity"]
        return {
            (dataset, variant, stage): self.score(variant, dataset, stage)
            for dataset in wanted["datasets"]
            for variant in wanted["variants"]
            for stage in self.stages(variant)
        }

    def _run(self, label, variant, dataset, part, layers, source, *, parts=(), dense=None, keeps=False) -> Run:
        wanted = self.settings["perplexity"]
        model, weights, windows = self.part(variant, "A"), self.part(variant, part), self.windows("perplexity", dataset)
        how = (wanted["batch_size"], wanted["dtype"], self.model, self.layout.num_layers)
        return Run(label, model, weights, tuple(layers), source, windows, *how, parts, dense, keeps)

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
        for part in self.merged_parts:
            placed += [f"{self.folder}/merged/{part}_merged/{name}" for name in self.merge(part).names]
        for dataset, variant, stage in self.scores():
            placed += [f"{self.folder}/ppl/{dataset}/{variant}.{stage}.{kind}" for kind in ("json", "parquet")]
        return placed
