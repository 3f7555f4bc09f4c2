"""What is usually looked at instead of the damage: how little layers change what goes through them.

Both are taken from the dense model's own pass, which is run in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cosine_similarity


class Proxies:
    """Cosines between what enters and what leaves layers of the dense model, window by window.

    Attributes:
        last_token: of each window's last token, between what enters layer i and what leaves layer i + block - 1;
            float64, a list a window, by i.
        all_tokens: between what enters and what leaves each layer, mean over a window's tokens; float64, likewise.
    """

    def __init__(self, block: int) -> None:
        """Begin without windows.

        Args:
            block: layers in a block.
        """
        self._block = block
        self.last_token: list[list[float]] = []
        self.all_tokens: list[list[float]] = []

    def batch(self) -> BatchProxies:
        """What counts the windows of one batch."""
        return BatchProxies(self._block)

    def add(self, last_token: Sequence[Sequence[float]], all_tokens: Sequence[Sequence[float]]) -> None:
        """Take what is known of further windows."""
        self.last_token += map(list, last_token)
        self.all_tokens += map(list, all_tokens)

    def angular_distance(self, start: int) -> float:
        """Of the block that begins with a layer: arccos(mean over windows of the cosine) / pi, see `angle`."""
        return angle(sum(window[start] for window in self.last_token) / len(self.last_token))

    def block_influence(self, layers: Sequence[int]) -> float:
        """The sum over some layers of ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853, equation 1).

        BI of a layer = 1 - mean over all tokens of the cosine between what enters and what leaves it. ShortGPT removes
        the layers of the smallest BI; of blocks, the sum of their layers' BI ranks them alike.
        """
        windows = len(self.all_tokens)
        return sum(1 - sum(window[layer] for window in self.all_tokens) / windows for layer in layers)


class BatchProxies:
    """Collects the dense model's hidden states of one batch, layer after layer."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._last: list[torch.Tensor] = []
        self._changes: list[torch.Tensor] = []

    def take(self, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Take what enters and what leaves the next layer, shape (n, tokens, hidden) both."""
        if not self._last:
            self._last.append(entering[:, -1].float().cpu())
        self._last.append(leaving[:, -1].float().cpu())
        self._changes.append(cosine_similarity(entering.float(), leaving.float(), dim=-1).double().mean(-1).cpu())

    def cosines(self) -> tuple[list[list[float]], list[list[float]]]:
        """(of last tokens, of all tokens) as `Proxies` keeps them, a list a window."""
        states = torch.stack(self._last).double()
        over = cosine_similarity(states[: -self._block], states[self._block :], dim=-1)
        return over.T.tolist(), torch.stack(self._changes, 1).tolist()


def angle(cosine: float) -> float:
    """arccos(cosine) / pi, after Gromov et al. 2024 (arXiv 2403.17887, section 3.2), who average the angles."""
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi
