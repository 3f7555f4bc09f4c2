"""What is evaluated: a model, the bundles restored into it, adapters left unmerged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning
from mistral_prune_lora.checkpoints.undo import changed_layers, put_back, read_undo
from mistral_prune_lora.errors import AdapterError, LayoutError
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.models.ends import outside_entries
from mistral_prune_lora.streaming.compute import LayerSource, UnmergedAdapter
from mistral_prune_lora.streaming.record import parameters

_STAGE_SIGN = {"A": "A", "AB": "AB", "FULL": "ABC"}


class PlacedAdapter(UnmergedAdapter, Protocol):
    """An adapter that is run beside the weights of one part's layers, and what a user is told of it.

    Attributes:
        path: its directory.
        part: "A", "B" or "C", whose layers it is for.
        out_of_scope: how many of its tensors are left out.
    """

    path: Path
    part: str
    out_of_scope: int


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, with whatever can be restored into it.

    Attributes:
        model: an A model, a merged A, or a dense model.
        bundles: bundles by part, "B" and "C".
        adapters: LoRA adapters to leave unmerged, by the part whose layers they are for.
        name: for labels; the model directory's name if empty.
    """

    model: Checkpoint
    bundles: Mapping[str, Checkpoint] = field(default_factory=dict)
    adapters: Mapping[str, tuple[PlacedAdapter, ...]] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        """Raise a LayoutError if the parts are of different prunings."""
        check_same_pruning(self._parts)

    @property
    def _parts(self) -> list[Path]:
        return [self.model.path, *(bundle.path for bundle in self.bundles.values())]

    @property
    def pruning_identity(self) -> str | None:
        """The identity of the pruning that all parts are of; None if one of them carries none."""
        return check_same_pruning(self._parts)

    @classmethod
    def open(cls, model_dir: str | Path, bundles: Mapping[str, str | Path] | None = None, **kwargs) -> Subject:
        """Open the directories; CheckpointError or LayoutError if they are not what they should be."""
        return cls(open_checkpoint(model_dir), {p: open_checkpoint(b) for p, b in (bundles or {}).items()}, **kwargs)

    @property
    def layout(self) -> Layout:
        """The parts, as the manifest says, or else the bundles; a model without a manifest keeps all its layers."""
        layout = self.model.layout or Layout(self.model.config["num_hidden_layers"])
        return layout.assigned({part: b.layers for part, b in self.bundles.items()}, where=self.model.path)

    @property
    def is_dense(self) -> bool:
        """Whether the model runs without none of its layers."""
        return not self.layout.dropped

    def at(self, stage: str) -> Subject:
        """The subject as it is at a stage: with what the stage's bundles put back in other parts.

        Raises:
            CheckpointError: as `undo.put_back`.
            AdapterError: an adapter is left unmerged on a part of which something is put back.
        """
        bundles = {part: self.bundles[part] for part in PARTS_OF_STAGE[stage] if part in self.bundles}
        for bundle in bundles.values():
            undo = read_undo(bundle)
            undone = {self.layout.part_of(layer) for layer in undo.layers} if undo else set()
            if adapted := sorted(undone & self.adapters.keys()):
                raise AdapterError(
                    f"puts back the original weights of {adapted[0]}, beside which an adapter is to run unmerged",
                    where=bundle.path,
                    mend="Leave the adapter out, or use bundles without undo.safetensors",
                )
        model, *rest = put_back([self.model, *bundles.values()])
        return replace(self, model=model, bundles={**self.bundles, **dict(zip(bundles, rest, strict=True))})

    def original_layers(self, stage: str) -> frozenset[int]:
        """The layers that a stage runs with original weights that one of its bundles has put back."""
        there = self.at(stage)
        pairs = [(self.model, there.model), *((self.bundles[part], there.bundles[part]) for part in self.bundles)]
        return frozenset().union(*(changed_layers(before, after) for before, after in pairs))

    def sources(self, layers: Sequence[int]) -> list[LayerSource]:
        """Where the layers' weights lie.

        Raises:
            LayoutError: a layer's bundle is not given or does not hold it; the model lacks a layer that it should keep.
        """
        return [self._source(layer) for layer in layers]

    def _source(self, layer: int) -> LayerSource:
        part = self.layout.part_of(layer)
        holder = self.model if part == "A" else self.bundles.get(part)
        if holder is None:
            raise LayoutError(
                f"layer {layer} was dropped into bundle {part}, and no such bundle is given",
                where=self.model.path,
                mend=f"Give the {part} bundle that was cut from this model, or leave this stage out",
            )
        if layer not in holder.layers:
            raise LayoutError(
                f"there are no weights of layer {layer}, which belongs to {part}",
                where=holder.path,
                mend="Use a model and bundles of one pruning, with its manifest.json",
            )
        return LayerSource(layer, holder, self.adapters.get(part, ()))

    def label(self, stage: str) -> str:
        """A_merged[A], A_merged[AB], A_merged[ABC]; for a dense model its name and [dense]; with + before adapters."""
        name = self.name or self.model.path.name
        names = "".join(f"+{a.name}" for part in PARTS_OF_STAGE[stage] for a in self.adapters.get(part, ()))
        return f"{name}{names}[{'dense' if self.is_dense else _STAGE_SIGN[stage]}]"

    def parameters(self, layers: Sequence[int]) -> int:
        """Parameters of embedding, final norm, head (tied ones once) and the given layers, adapters not counted."""
        return parameters(outside_entries(self.model).values()) + sum(
            parameters(source.checkpoint.layer(source.index).values()) for source in self.sources(layers)
        )
