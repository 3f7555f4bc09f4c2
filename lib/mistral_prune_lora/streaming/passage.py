"""Windows on their way through a model's layers: which ones, how, and where they set out from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedConfig

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.tensor_names import EMBEDDING
from mistral_prune_lora.errors import DataError, NumberError
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.models.ends import Embedding, check_ids
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.finite import all_finite, tensor_fault
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.record import RunRecord
from mistral_prune_lora.streaming.shards import Shard
from mistral_prune_lora.text.windows import Windows, windows_between


@dataclass(frozen=True)
class Passage:
    """Windows that go through a model's layers, and how.

    Attributes:
        model: gives the configuration, and the embedding where a run sets out from the token ids.
        windows: the token ids.
        compute: device, dtype, batch size, memory.
        whole: the windows that these are a shard of; None if these are all.
        first: which of them the shard begins with.
    """

    model: Checkpoint
    windows: Windows
    compute: Compute
    whole: Windows | None = None
    first: int = 0

    def shard(self, shard: Shard | None) -> Passage:
        """The passage of a shard's windows; None takes all.

        Raises:
            DataError: there are not so many batches.
        """
        if shard is None:
            return self
        span = shard.span(len(self.windows), self.compute.batch_size)
        return replace(self, windows=windows_between(self.windows, *span), whole=self.windows, first=span[0])

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return model_config(self.model)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of all windows' hidden states at one place in the model: (windows, seqlen, hidden)."""
        return (*self.windows.ids.shape, self.config.hidden_size)

    @property
    def nbytes(self) -> int:
        """The size of those hidden states."""
        return math.prod(self.shape) * self.compute.dtype.itemsize

    @property
    def batches(self) -> range:
        """The numbers of the batches. Batch k always is the windows from k * batch_size on."""
        return range(math.ceil(len(self.windows) / self.compute.batch_size))

    def windows_of(self, batch: int) -> slice:
        """The windows of a batch; the last one may be smaller."""
        first = batch * self.compute.batch_size
        return slice(first, min(first + self.compute.batch_size, len(self.windows)))

    def ids_of(self, batch: int) -> torch.Tensor:
        """The token ids of a batch, int32, shape (n, seqlen)."""
        return self.windows.ids[self.windows_of(batch)]

    def positions_of(self, batch: int) -> torch.Tensor | None:
        """The positions of a batch's tokens, int32, shape (n, seqlen); None where every window is one run."""
        return None if self.windows.positions is None else self.windows.positions[self.windows_of(batch)]

    def origin(self, file: str | Path | None) -> Origin:
        """Where to set out from: the boundary activations in a file, or the token ids."""
        return TokenIds(self) if file is None else self.boundary(file)

    def boundary(self, file: str | Path) -> Boundary | PartOfBoundary:
        """What another run left in a file: of all windows, also where this is a shard."""
        return Boundary(self, file) if self.whole is None else PartOfBoundary(self, file)


class Origin(Protocol):
    """Where hidden states come from.

    Attributes:
        record: of the run that led there.
        nbytes: memory on the compute device that reading takes.
    """

    record: RunRecord
    nbytes: int

    def read(self, first: int, last: int) -> torch.Tensor:
        """The hidden states of the windows first..last-1 as a CPU tensor (last - first, seqlen, hidden)."""

    def fault(self, window: int) -> NumberError | None:
        """The error for a window that is not all numbers here already; None if it is."""


class TokenIds:
    """Hidden states made of token ids by the model's embedding; DataError for an id that it has none for."""

    def __init__(self, passage: Passage) -> None:
        check_ids(passage.model, passage.windows.ids)
        self._passage = passage
        self.record = RunRecord.start(passage.model, passage.windows, passage.compute.dtype)
        self.nbytes = embedding_bytes(passage.model, passage.compute)

    @cached_property
    def _embedding(self) -> Embedding:
        return Embedding(self._passage.model, self._passage.compute.dtype)

    def read(self, first: int, last: int) -> torch.Tensor:
        """See `Origin.read`."""
        return self._embedding(self._passage.windows.ids[first:last])

    def fault(self, window: int) -> NumberError | None:
        """See `Origin.fault`."""
        hidden = self.read(window, window + 1)[0]
        position = next((i for i, token in enumerate(hidden) if not all_finite(token)), None)
        if position is None:
            return None
        row = int(self._passage.windows.ids[window, position])
        entry = self._passage.model.entries[EMBEDDING]
        return tensor_fault(entry, self._passage.compute.dtype, slice(row, row + 1))


class Boundary:
    """Boundary activations out of a file.

    Attributes:
        path: the file.
        whole_record: the record of the run over all windows.
    """

    nbytes = 0

    def __init__(self, passage: Passage, path: str | Path) -> None:
        """Open them.

        Raises:
            CheckpointError: it is no file of activations.
            DataError: they are not of this passage's windows, dtype and kind of model.
        """
        self._file = ActivationReader(path)
        self.path = self._file.path
        self.record = self.whole_record = RunRecord.parse(self._file.run, path)
        self.record.check_continues(RunRecord.start(passage.model, passage.windows, passage.compute.dtype), path)
        found, wanted = (self._file.shape, self._file.dtype), (passage.shape, passage.compute.dtype)
        if found != wanted:
            raise DataError(
                f"was made with another shape ({found}, not {wanted})", where=path, mend="Run its segment again"
            )

    def read(self, first: int, last: int) -> torch.Tensor:
        """See `Origin.read`."""
        return self._file.read(first, last)

    def fault(self, window: int) -> NumberError | None:
        """See `Origin.fault`."""
        if all_finite(self.read(window, window + 1)):
            return None
        return NumberError(
            f"window {window} holds NaN or infinity", where=self.path, mend="Delete it and run the same again"
        )


class PartOfBoundary:
    """A shard's boundary activations, out of a file that holds those of all windows.

    Attributes:
        whole_record: the record of the run over all windows.
    """

    nbytes = 0

    def __init__(self, passage: Passage, path: str | Path) -> None:
        """Open them; errors as for `Boundary`."""
        assert passage.whole is not None
        self._all = Boundary(replace(passage, windows=passage.whole, whole=None, first=0), path)
        self._first = passage.first
        self.whole_record = self._all.record
        self.record = self.whole_record.of_windows(passage.windows)

    def read(self, first: int, last: int) -> torch.Tensor:
        """See `Origin.read`."""
        return self._all.read(self._first + first, self._first + last)

    def fault(self, window: int) -> NumberError | None:
        """See `Origin.fault`."""
        return self._all.fault(self._first + window)


def embedding_bytes(model: Checkpoint, compute: Compute) -> int:
    """Memory on the compute device that the embedding takes: it stays on the CPU, in its stored dtype."""
    return 0 if compute.device.type == "cuda" else model.entries[EMBEDDING].nbytes
