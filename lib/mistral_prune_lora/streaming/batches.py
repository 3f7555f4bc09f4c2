"""Batches of hidden states on their way to the device and back, while another one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from mistral_prune_lora.streaming.compute import Compute


def stream_batches(
    read: Callable[[int, int], torch.Tensor], batches: Sequence[int], windows: int, compute: Compute
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (batch number, hidden states on the device); the next batch is fetched while one is computed.

    Batch k always is the windows from k * batch_size on, so a resumed run cuts them as an undisturbed one does. On a
    GPU they come through pinned memory on a stream of their own.

    Args:
        read: gives windows a..b-1 as a CPU tensor (b - a, seqlen, hidden).
        batches: the numbers wanted.
        windows: how many there are in all; bounds the last batch.
        compute: device and batch size, and whether to fetch ahead.
    """
    copies = torch.cuda.Stream(compute.device) if compute.copies_meanwhile else None

    def fetch(batch: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        first = batch * compute.batch_size
        hidden = read(first, min(first + compute.batch_size, windows))
        if copies is None:
            return hidden.to(compute.device), None
        with torch.cuda.stream(copies):
            moved = hidden.pin_memory().to(compute.device, non_blocking=True)
            return moved, copies.record_event()

    if not compute.overlap:
        for batch in batches:
            yield batch, fetch(batch)[0]
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = deque((batch, reader.submit(fetch, batch)) for batch in batches[:1])
        for following in [*batches[1:], None]:
            if not waiting:
                return
            batch, future = waiting.popleft()
            hidden, arrived = future.result()
            if following is not None:
                waiting.append((following, reader.submit(fetch, following)))
            if arrived is not None:
                here = torch.cuda.current_stream(compute.device)
                here.wait_event(arrived)
                hidden.record_stream(here)
            yield batch, hidden


class DelayedStore:
    """Hands finished batches to a sink on the CPU; from a GPU each is copied back while the next one computes."""

    def __init__(self, sink: Callable[[int, torch.Tensor], None], compute: Compute) -> None:
        self._sink = sink
        self._copies = torch.cuda.Stream(compute.device) if compute.copies_meanwhile else None
        self._pending: tuple | None = None

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Store a batch, soon."""
        if self._copies is None:
            self._sink(batch, hidden.cpu())
            return
        self._copies.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(self._copies):
            host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            host.copy_(hidden, non_blocking=True)
            hidden.record_stream(self._copies)
            arrived = self._copies.record_event()
        self.flush()
        self._pending = (batch, host, arrived)

    def flush(self) -> None:
        """Wait for what is still on its way."""
        if self._pending:
            batch, host, arrived = self._pending
            arrived.synchronize()
            self._pending = None
            self._sink(batch, host)
