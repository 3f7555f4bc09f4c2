"""Batches of training windows with all that a step needs of them; the next one comes while one computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.text.windows import Windows


@dataclass(frozen=True)
class Batch:
    """Some windows, on the device.

    Attributes:
        ids: int64, shape (n, seqlen).
        positions: int64, shape (n, seqlen), of each token in its document; None where every window is one.
        places: which of the n * (seqlen - 1) predictions are scored, int64; None means all.
        targets: the true next tokens of those, int64, shape (scored,).
        entering: what enters the first adapted layer, shape (n, seqlen, hidden), if that is known.
        taught: the teacher's final hidden states after the norm, shape (n, seqlen, its hidden), if those are stored.
        taught_layer: what leaves the teacher's watched layer, likewise.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    places: torch.Tensor | None
    targets: torch.Tensor
    entering: torch.Tensor | None = None
    taught: torch.Tensor | None = None
    taught_layer: torch.Tensor | None = None

    def scored(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states (n, seqlen, hidden) those that a scored token is predicted from: (scored, hidden)."""
        flat = hidden[:, :-1].flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


@dataclass(frozen=True)
class Shelf:
    """Where batches are read from.

    Attributes:
        windows: the token ids.
        device: that they go to.
        entering, taught, taught_layer: stored hidden states of the same windows, as a `Batch` has them.
    """

    windows: Windows
    device: torch.device
    entering: ActivationReader | None = None
    taught: ActivationReader | None = None
    taught_layer: ActivationReader | None = None

    def predictions(self, chosen: Sequence[int]) -> int:
        """How many tokens of some windows are scored."""
        scored = self.windows.scored
        return len(chosen) * (self.windows.seqlen - 1) if scored is None else int(scored[list(chosen), 1:].sum())

    def read(self, chosen: Sequence[int]) -> Batch:
        """The batch of some windows.

        Raises:
            DataError: stored states are not what was written there.
        """
        windows, rows = self.windows, list(chosen)
        targets, places = windows.ids[rows][:, 1:].flatten().long(), None
        if windows.scored is not None:
            places = windows.scored[rows][:, 1:].flatten().nonzero().squeeze(1)
            targets = targets[places]
        return Batch(
            self._moved(windows.ids[rows].long()),
            None if windows.positions is None else self._moved(windows.positions[rows].long()),
            None if places is None else self._moved(places),
            self._moved(targets),
            *(self._states(file, rows) for file in (self.entering, self.taught, self.taught_layer)),
        )

    def ahead(self, batches: Iterable[Sequence[int]]) -> Generator[Batch, None, None]:
        """Batches one after the other; the next one is read while the caller computes."""
        return _read_ahead(self.read, batches)

    def _states(self, file: ActivationReader | None, rows: list[int]) -> torch.Tensor | None:
        return None if file is None else self._moved(torch.cat([file.read(row, row + 1) for row in rows]))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor
        # From pinned memory a copy does not hold up who asks for it; kernels of the same stream wait for it by order.
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _read_ahead(
    read: Callable[[Sequence[int]], Batch], batches: Iterable[Sequence[int]]
) -> Generator[Batch, None, None]:
    """What `read` makes of each of some batches, one ahead of the caller."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for chosen in batches:
            following = reader.submit(read, chosen)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
