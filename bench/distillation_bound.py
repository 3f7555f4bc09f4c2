"""What the training of an adapter must compute, in multiply-adds of matrix products, told from the geometry alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A model's sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's weight matrices."""
        attention, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, attention),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (attention, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one part's training on windows that are each seen `passes` times, per window and pass.

    Attributes:
        plain: teacher and student side by side, from the embedding on, in every step.
        first: with the teacher's last hidden states and the states before the first adapted layer made once, here.
        later: the same where both are there already.
        alone: as `first`, where no other part has left the states before its own first layer.
    """

    plain: float
    first: float
    later: float
    alone: float


def work(
    geometry: Geometry,
    active: Sequence[int],
    adapted: Collection[int],
    *,
    seqlen: int,
    passes: float,
    rank: int,
    teacher_made_here: bool,
    reached: int = 0,
) -> Work:
    """Count the products.

    A window's forward pass through a layer is its weight matrices' products with every token, and attention's two with
    the tokens before each (half of the square). Its backward pass has the products of the gradient with the same
    matrices - frozen matrices need no gradient of their own - and four of attention. LoRA's two thin products a matrix
    have four in the backward pass. The backward pass ends at the lowest adapted layer, of which queries, keys and
    values give no gradient on to their input. The head counts once for the teacher and twice for the student in every
    step, whoever trains: a file of states ends before it.

    Args:
        geometry: the model's.
        active: the student's layers, by their original indices, in order.
        adapted: those that have an adapter.
        seqlen: token ids of a window.
        passes: how often training sees each window.
        rank: of LoRA.
        teacher_made_here: whether this part's training is the one that runs the teacher's layers.
        reached: how many of the student's layers an earlier part's file of states has behind it.

    Returns:
        Multiply-adds, each for one window in one pass; their ratios are ratios of the training.
    """
    shapes = geometry.projections
    square = geometry.heads * geometry.head_dim * seqlen * (seqlen + 1)  # two products, half of each
    layer = seqlen * sum(a * b for a, b in shapes.values()) + square
    thin = seqlen * rank * sum(a + b for a, b in shapes.values())
    head = (seqlen - 1) * geometry.hidden * geometry.vocabulary
    lowest = active.index(min(adapted))
    above, lora = len(active) - lowest, len(adapted) * thin
    not_handed_on = seqlen * sum(a * b for a, b in (shapes[name] for name in ("q_proj", "k_proj", "v_proj")))
    forward, backward = above * layer + lora + head, above * (layer + square) - not_handed_on + 2 * lora + head
    step = forward + backward + head
    made = geometry.layers * layer / passes if teacher_made_here else 0
    return Work(
        plain=geometry.layers * layer + lowest * layer + step,
        first=made + max(0, lowest - reached) * layer / passes + step,
        later=step,
        alone=made + lowest * layer / passes + step,
    )


def weight_bytes(geometry: Geometry, layers: int, *, embeddings: int = 1, heads: int = 1) -> int:
    """Bytes of so many layers in float32, with so many copies of embedding table and head."""
    layer = sum(a * b for a, b in geometry.projections.values())
    return 4 * (layers * layer + (embeddings + heads) * geometry.vocabulary * geometry.hidden)
