"""The student: the directories that a part's adapter is trained on, and which of their layers are whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.directories import bundle_layers
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning
from mistral_prune_lora.checkpoints.undo import changed_layers, put_back
from mistral_prune_lora.distillation.settings import LoraSettings
from mistral_prune_lora.errors import AdapterError, CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES, Layout
from mistral_prune_lora.streaming.compute import LayerSource


@dataclass(frozen=True)
class Student:
    """The directories that a student is made of.

    Attributes:
        model_dir: the A model for part A, else the merged A.
        bundles: what is restored into it: for B its bundle; for C the merged B and then C's bundle.
    """

    model_dir: str | Path
    bundles: tuple[str | Path, ...] = ()

    def checkpoint(self) -> Checkpoint:
        """The model; CheckpointError if its directory does not say which layers it runs without."""
        checkpoint = self.parts()[0]
        self._layout_of(checkpoint)
        return checkpoint

    def parts(self) -> list[Checkpoint]:
        """The model and the bundles, with what these put back in each other."""
        return put_back([open_checkpoint(folder) for folder in (self.model_dir, *self.bundles)])

    def _layout_of(self, checkpoint: Checkpoint) -> Layout:
        if checkpoint.layout is None:
            raise CheckpointError(
                "there is no manifest.json", where=self.model_dir, mend="give an A model or a merged A"
            )
        return checkpoint.layout

    @property
    def layout(self) -> Layout:
        """The layers of A, B and C; errors as for `checkpoint`."""
        return self._layout_of(open_checkpoint(self.model_dir))

    def layers(self, trained: str, serving: Sequence[str] = ()) -> tuple[int, ...]:
        """The layers that an adapter is trained on.

        Args:
            trained: a part, or the stage that is trained as a whole: "A", "B", "C", "AB", "FULL".
            serving: the stages that one adapter is trained for at once; none for the one that the part is first run at.

        Raises:
            LayoutError: the part holds no layers; the bundles do not restore what the part's student has, or are of
                another pruning.
            CheckpointError: as for `checkpoint`.
        """
        by_part = self.layers_by_part(trained, serving)
        return tuple(sorted(layer for layers in by_part.values() for layer in layers))

    def layers_by_part(self, trained: str, serving: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
        """As `layers`, apart."""
        parts = PARTS_OF_STAGE.get(trained, trained)
        layout = self._layout(parts[-1])
        layers = {part: layout.layers_of(part) for part in parts}
        if empty := [part for part, held in layers.items() if not held]:
            told = f"{' and '.join(empty)} {'holds' if len(empty) == 1 else 'hold'} no layers"
            raise LayoutError(told, where="manifest.json", mend="there is nothing to train for it")
        largest = PARTS_OF_STAGE[max(serving, key=STAGES.index)][-1] if serving else parts[-1]
        self._check_restored(largest, layout)
        check_same_pruning([self.model_dir, *self.bundles])
        if serving:
            self._check_unchanged()
        return layers

    def adapted_layers(
        self, trained: str, wanted: Sequence[int] | None, serving: Sequence[str] = ()
    ) -> tuple[int, ...]:
        """Those of `layers` that get an adapter; LayoutError for one that is not among them.

        Args:
            trained, serving: as for `layers`.
            wanted: original indices; None means all.
        """
        layers = self.layers(trained, serving)
        if wanted is None:
            return layers
        if foreign := sorted(set(wanted) - set(layers)) or not wanted:
            told = f"names layers {foreign}, which are not {trained}'s" if foreign is not True else "names no layer"
            raise LayoutError(told, where="adapt_layers", mend=f"use some of {list(layers)}, or all")
        return tuple(sorted(set(wanted)))

    def check_modules(self, layers: Sequence[int], lora: LoraSettings) -> None:
        """Raise an AdapterError for names or patterns that no linear module of the layers has; from headers alone."""
        source = next(source for source in self.sources() if source.index == layers[0])
        shapes = source.checkpoint.layer(layers[0])
        known = [name.removesuffix(".weight") for name, entry in shapes.items() if len(entry.shape) == 2]
        for where, patterns in (
            ("target_modules", lora.target_modules),
            ("rank_pattern", tuple(lora.rank_pattern)),
            ("alpha_pattern", tuple(lora.alpha_pattern)),
        ):
            matching_modules(patterns, known, where)

    def sources(self) -> list[LayerSource]:
        """All layers that it runs, in order, where their weights lie."""
        return sorted(
            (LayerSource(i, each) for each in self.parts() for i in each.layers), key=lambda source: source.index
        )

    def _layout(self, part: str) -> Layout:
        """The layout, with B and C told by the bundles that are restored where the manifest leaves them open."""
        layout = self._layout_of(open_checkpoint(self.model_dir))
        if not layout.unassigned:
            return layout
        # From the end: C's student has one bundle where B holds no layers.
        parts = reversed("BC"[: "ABC".index(part)])
        held = {part: bundle_layers(bundle) for part, bundle in zip(parts, reversed(self.bundles), strict=False)}
        return layout.assigned(held, where="--bundle")

    def _check_unchanged(self) -> None:
        """Raise a LayoutError if a bundle puts something back in the model: a smaller stage has other weights then."""
        model = open_checkpoint(self.model_dir)
        if changed := changed_layers(model, self.parts()[0]):
            raise LayoutError(
                f"the bundles put back original weights of layers {sorted(changed)}, which smaller stages have not",
                where="--bundle",
                mend="train one adapter for several stages on the parts that pruning wrote",
            )

    def _check_restored(self, part: str, layout: Layout) -> None:
        """Raise a LayoutError unless the bundles restore exactly the layers that the part's student has."""
        restored = {layer for bundle in self.bundles for layer in open_checkpoint(bundle).layers}
        wanted = {layer for other in "BC"[: "ABC".index(part)] for layer in layout.layers_of(other)}
        if restored != wanted:
            raise LayoutError(
                f"the student of part {part} restores layers {sorted(wanted)}, the bundles hold {sorted(restored)}",
                where="--bundle",
                mend={
                    "A": "give no bundle for part A, unless it is trained for several stages",
                    "B": "give bundle B for part B, and no other",
                    "C": "give the merged bundle B and bundle C for part C",
                }[part],
            )


def matching_modules(patterns: Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """The modules that names or patterns speak of, as PEFT takes them; AdapterError for one that speaks of none.

    A plain last name such as q_proj stays as it is.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [n for n in known if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[2], pattern)]
        if not names:
            raise AdapterError(
                f"there are no modules {pattern} in the layers", where=where, mend=f"use some of {', '.join(known)}"
            )
        last = {name.rpartition(".")[2] for name in names}
        found |= dict.fromkeys([pattern] if last == {pattern} else names)
    return list(found)
