"""What a choice is asked for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_prune_lora.choosing.candidates import check_drop, check_splits

METHODS = ("blocks", "greedy")
SPLITS = ("contiguous", "all", "none")


@dataclass(frozen=True)
class ChoiceSettings:
    """What is chosen from, and how.

    Attributes:
        drop: layers to drop.
        keep_last_layer: never drop the last one.
        method: "blocks" measures every block of consecutive layers; "greedy" drops one layer after the other, each
            time the one without which the damage is least, consecutive or not.
        race: windows after which candidates surely worse than the best are dropped, again and again; None drops none.
        splits: how B and C are chosen: "contiguous" measures B at either end of the dropped layers, "all" every choice
            of B, "none" gives B the lower half unmeasured.
        b_sizes: layers of B to try; the first of them is chosen from, the others are told beside it. Empty takes half
            of them, the smaller half of an odd number.
    """

    drop: int
    keep_last_layer: bool = True
    method: str = "blocks"
    race: int | None = None
    splits: str = "contiguous"
    b_sizes: tuple[int, ...] = ()

    def sizes(self) -> tuple[int, ...]:
        """The sizes of B that are measured; none where nothing is."""
        if self.splits == "none" or self.drop < 2:
            return ()
        return self.b_sizes or (self.drop // 2,)

    def check(self, num_layers: int) -> None:
        """Raise a LayoutError unless a model of so many layers can be cut like that."""
        check_drop(num_layers, self.drop)
        check_splits(self.drop, self.b_sizes or self.sizes(), every=self.splits == "all")
