"""What measures an experiment's stages: segments that several of them go through, and the scores at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES, Layout
from mistral_prune_lora.layout.segments import Segment, segment_tree, shared_segments, stage_run
from mistral_prune_lora.workflow.artefacts import Run, Source
from mistral_prune_lora.workflow.healing import JOINT
from mistral_prune_lora.workflow.once import once
from mistral_prune_lora.workflow.restoring import original_layers

if TYPE_CHECKING:
    from mistral_prune_lora.workflow.experiment import Experiment


@dataclass(frozen=True)
class Measuring:
    """The evaluation of one experiment, on the parts that it is made of."""

    experiment: Experiment = field(repr=False)
    _answers: dict = field(default_factory=dict, repr=False, compare=False)

    @once
    def tree(self, variant: str) -> list[Segment]:
        """The segments of one variant; the dense model is a single one."""
        if variant == "dense":
            return segment_tree(Layout(self.experiment.layout.num_layers), ("FULL",))
        return segment_tree(self.experiment.layout, self.stages(variant), self._original(variant))

    @once
    def _original(self, variant: str) -> dict[str, frozenset[int]]:
        """Of each stage, the layers whose original weights its bundles put back."""
        if variant in ("dense", "pruned", *JOINT):
            return {}
        return original_layers(self.experiment.settings, self.experiment.layout)

    def _restored(self, variant: str, stage: str, layers: Sequence[int]) -> tuple[Source, ...]:
        """All parts of a stage, if its bundles put something back in some layers."""
        original = self._original(variant).get(stage, frozenset())
        return self.experiment.parts(variant, PARTS_OF_STAGE[stage]) if original.intersection(layers) else ()

    def stages(self, variant: str) -> list[str]:
        """The stages that one variant is measured at."""
        if variant in JOINT:
            return [JOINT[variant]]
        return ["FULL"] if variant == "dense" else self.experiment.settings["perplexity"]["stages"]

    @once
    def segment(self, variant: str, dataset: str, name: str) -> Run:
        """The run of a segment that others start from."""
        segment = next(s for s in self.tree(variant) if s.name == name)
        source = self.segment(variant, dataset, segment.parent) if segment.parent else None
        run = self._run(segment.name, variant, dataset, segment.part, segment.layers, source)
        smallest = min(segment.through, key=STAGES.index)
        return replace(run, restores=self._restored(variant, smallest, segment.layers))

    def shared_runs(self, variant: str, dataset: str) -> list[Run]:
        """The runs of all segments that others start from."""
        if variant == "dense":
            return []
        return [self.segment(variant, dataset, s.name) for s in shared_segments(self.tree(variant))]

    @once
    def score(self, variant: str, dataset: str, stage: str) -> Run:
        """The score of a stage: the dense model's, or that of a stage's tail."""
        compared = self.experiment.settings["perplexity"]["compare_with_dense"]
        if variant == "dense":
            layers = tuple(range(self.experiment.layout.num_layers))
            return self._run("dense", variant, dataset, "A", layers, None, keeps=True)
        start, tail = stage_run(self.tree(variant), stage)
        run = self._run(
            stage,
            variant,
            dataset,
            tail.part if tail else "A",
            tail.layers if tail else (),
            self.segment(variant, dataset, start) if start else None,
            parts=self.experiment.parts(variant, PARTS_OF_STAGE[stage]),
            dense=self.score("dense", dataset, "FULL") if compared else None,
        )
        return replace(run, restores=self._restored(variant, stage, self.experiment.layout.active(stage)))

    @once
    def scores(self) -> dict[tuple[str, str, str], Run]:
        """Every score that makes a row of the summary, by (dataset, variant, stage)."""
        wanted = self.experiment.settings["perplexity"]
        return {
            (dataset, variant, stage): self.score(variant, dataset, stage)
            for dataset in wanted["datasets"]
            for variant in self.experiment.variants
            for stage in self.stages(variant)
        }

    def _run(self, label, variant, dataset, part, layers, source, *, parts=(), dense=None, keeps=False) -> Run:
        made, wanted = self.experiment, self.experiment.settings["perplexity"]
        model, weights, windows = made.part(variant, "A"), made.part(variant, part), made.windows("perplexity", dataset)
        how = (wanted["batch_size"], wanted["dtype"], made.model, made.layout.num_layers)
        shards = wanted["shards"]
        return Run(label, model, weights, tuple(layers), source, windows, *how, parts, dense, keeps, shards=shards)
