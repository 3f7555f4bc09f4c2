"""Ridge regression from moments: sums over tokens, from which every ridge and every rank follows without the tokens.

With features X (tokens, inner) and what is wanted Y (tokens, hidden), W = argmin |Y - X W|^2 + ridge |W|^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_BLOCKS = 8
RIDGES = tuple(10 ** (-exponent / 2) for exponent in range(17))  # 1 to 1e-8, times the mean square of a feature


@dataclass(frozen=True)
class Moments:
    """Means over tokens, in float64.

    Attributes:
        gram: X^T X / tokens, shape (inner, inner).
        cross: X^T Y / tokens, shape (inner, hidden).
        energy: |Y|^2 / tokens.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float

    def loss(self, weights: torch.Tensor) -> float:
        """|Y - X W|^2 / tokens of a solution, shape (inner, hidden)."""
        return self.energy - 2 * float((weights * self.cross).sum()) + float((weights * (self.gram @ weights)).sum())


class Sums:
    """Moments while they are summed: of one text, token by token."""

    def __init__(self, inner: int, hidden: int, device: torch.device) -> None:
        # Of X^T X, which is symmetric, the blocks on and below the diagonal: little more than half of the products.
        edges = [inner * n // _BLOCKS for n in range(_BLOCKS + 1)]
        self._blocks = list(itertools.pairwise(edges))
        self._gram = torch.zeros(inner, inner, dtype=torch.float64, device=device)
        self._cross = torch.zeros(inner, hidden, dtype=torch.float64, device=device)
        self._energy = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, features: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count some tokens: shapes (tokens, inner) and (tokens, hidden), of any floating dtype."""
        features, wanted = features.double(), wanted.double()
        for first, last in self._blocks:
            self._gram[first:, first:last].addmm_(features[:, first:].T, features[:, first:last])
        self._cross.addmm_(features.T, wanted)
        self._energy += wanted.square().sum()
        self._tokens += len(features)

    def moments(self) -> Moments:
        """The means so far; the sums are used up."""
        for first, last in self._blocks:
            self._gram[first:last, last:] = self._gram[last:, first:last].T
        gram, cross = self._gram.div_(self._tokens), self._cross.div_(self._tokens)
        return Moments(gram, cross, float(self._energy) / self._tokens)


def mixed(moments: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Several texts' moments as one: each counts by its weight, however many tokens it has."""
    if len(moments) == 1:
        return moments[0]
    shares = [weight / sum(weights) for weight in weights]
    gram, cross = torch.zeros_like(moments[0].gram), torch.zeros_like(moments[0].cross)
    for each, share in zip(moments, shares, strict=True):
        gram.add_(each.gram, alpha=share)
        cross.add_(each.cross, alpha=share)
    return Moments(gram, cross, sum(share * each.energy for share, each in zip(shares, moments, strict=True)))


@dataclass(frozen=True)
class Solution:
    """What a regression found.

    Attributes:
        weights: W, float64, shape (inner, hidden).
        ridge: as a multiple of the mean square of a feature.
        residual: |Y - X W|^2 / |Y|^2 on the tokens that it was found on.
        held_out: the same on others; None without any.
    """

    weights: torch.Tensor
    ridge: float
    residual: float
    held_out: float | None


def solve(moments: Moments, held_out: Moments | None, ridge: float | None, rank: int | None) -> Solution:
    """The solution, with the ridge that leaves least on held-out tokens, of full rank or the best one of a lower rank.

    Of all matrices of rank r, W V V^T is the one with the least regularised loss, where V holds the leading r
    eigenvectors of W^T (X^T X + ridge) W: reduced-rank regression (Izenman 1975,
    https://doi.org/10.1016/0047-259X(75)90042-1) with a ridge as in Mukherjee and Zhu 2011
    (https://doi.org/10.1002/sam.10138). It is the truncated singular value decomposition in whitened space.

    Args:
        moments: to solve for.
        held_out: to choose the ridge on; needed unless it is given.
        ridge: as a multiple of the mean square of a feature; None chooses among `RIDGES`.
        rank: at most the width of what is wanted; None keeps the full one.
    """
    if rank is not None and rank >= moments.cross.shape[1]:
        rank = None
    scale = float(moments.gram.diagonal().mean())
    eigenvalues, vectors = torch.linalg.eigh(moments.gram)
    eigenvalues.clamp_(min=0)  # sums round a singular matrix's zeros to either side
    projected = vectors.T @ moments.cross

    def found(ridge: float) -> torch.Tensor:
        weights = vectors @ (projected / (eigenvalues + ridge * scale)[:, None])
        if rank is None:
            return weights
        # (X^T X + ridge) W is X^T Y, so this is W^T (X^T X + ridge) W.
        kept = weights.T @ moments.cross
        leading = torch.linalg.eigh((kept + kept.T) / 2)[1][:, -rank:]
        return weights @ leading @ leading.T

    if ridge is None:
        assert held_out is not None
        if rank is None:
            left = _losses(held_out, vectors, projected)
            ridge = min(RIDGES, key=lambda each: left(1 / (eigenvalues + each * scale)))
        else:
            ridge = min(RIDGES, key=lambda each: held_out.loss(found(each)))
    weights = found(ridge)
    share = None if held_out is None else held_out.loss(weights) / held_out.energy
    return Solution(weights, ridge, moments.loss(weights) / moments.energy, share)


def _losses(held_out: Moments, vectors: torch.Tensor, projected: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """What `Moments.loss` says of W = V diag(d) P for any d, without W: P P^T and V^T X^T X V are the same for all.

    Args:
        held_out: moments of the tokens that are asked about.
        vectors: V, shape (inner, inner).
        projected: P, shape (inner, hidden).
    """
    linear = (projected * (vectors.T @ held_out.cross)).sum(1)
    square = (vectors.T @ held_out.gram @ vectors).mul_(projected @ projected.T)
    return lambda d: held_out.energy - 2 * float(d @ linear) + float(d @ (square @ d))


def factors(weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W^T as B A: LoRA's factors A (rank, inner) and B (hidden, rank), float32, with a scaling of 1.

    Args:
        weights: a solution of at most this rank, shape (inner, hidden). Of full rank, B is the identity, so that the
            product rounds nothing.
    """
    if rank >= weights.shape[1]:
        return weights.T.float().contiguous(), torch.eye(weights.shape[1])
    left, values, right = torch.linalg.svd(weights, full_matrices=False)
    a = (left[:, :rank] * values[:rank]).T
    return a.float().contiguous(), right[:rank].T.float().contiguous()
