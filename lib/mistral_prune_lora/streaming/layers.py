"""Decoder layers streamed over windows: as many resident as memory allows, hidden states read and written by batch.

The model's own class runs the layers, with a PassLayer wherever none is resident and neither embedding nor final norm:
positions, rotary embedding and attention mask are made by the code that makes them in the whole model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.errors import DataError, PipelineError
from mistral_prune_lora.models.architecture import empty_decoder
from mistral_prune_lora.models.load import build_layer
from mistral_prune_lora.models.pass_layer import PassLayer
from mistral_prune_lora.sizes import size_text

# Of what is free; the rest is for whoever else is on the machine, and for the page cache that weights are read through.
# A CPU gains nothing from more layers at once but fewer trips of the hidden states to disk, so it takes less.
_SHARE_OF_FREE_MEMORY = {"cuda": 0.5, "cpu": 0.25}


@dataclass(frozen=True)
class Compute:
    """How to compute: where, in which dtype, how many windows at once, in how much memory.

    Attributes:
        device: of weights and arithmetic.
        dtype: of weights and hidden states.
        batch_size: windows that go through a layer together.
        max_memory: bytes for weights and hidden states on the device; None means half of what is free on a GPU, a
            quarter of what is free on a CPU.
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int = 1
    max_memory: int | None = None

    @property
    def memory(self) -> int:
        """The bytes that may be used."""
        if self.max_memory is not None:
            return self.max_memory
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0] * _SHARE_OF_FREE_MEMORY["cuda"])
        return int(psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY["cpu"])


class UnmergedAdapter(Protocol):
    """What a LoRA adapter must offer to be run beside the weights instead of merged into them."""

    name: str

    def digest(self, index: int) -> str:
        """Identifies everything the adapter does to a layer."""

    def wrap(self, layer: nn.Module, index: int) -> None:
        """Put its low-rank paths around the layer's projections, in place."""


@dataclass(frozen=True)
class LayerSource:
    """A decoder layer to run.

    Attributes:
        index: original layer index.
        checkpoint: a model or bundle that holds its weights.
        adapters: put around the layer's projections once it is built, unmerged.
    """

    index: int
    checkpoint: Checkpoint
    adapters: tuple[UnmergedAdapter, ...] = ()

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the layer's weights in `dtype`."""
        entries = self.checkpoint.layer(self.index).values()
        return sum(e.nbytes // e.itemsize * dtype.itemsize for e in entries)


def resident_groups(
    sources: Sequence[LayerSource], compute: Compute, config: PreTrainedConfig, seqlen: int, reserved: int = 0
) -> list[list[LayerSource]]:
    """Consecutive layers that fit into memory together, in order.

    Args:
        sources: the layers to run, in order.
        compute: gives budget, dtype and batch size.
        config: the model's geometry.
        seqlen: token ids in a window.
        reserved: bytes that something else on the device takes, such as the head.

    Raises:
        PipelineError: not even one layer fits.
    """
    sizes = [source.nbytes(compute.dtype) for source in sources]
    memory, beside = compute.memory, reserved + working_bytes(compute, config, seqlen)
    # On a GPU the next group is copied while one computes.
    copies = 2 if compute.device.type == "cuda" and sum(sizes) > memory - beside else 1
    budget = (memory - beside) // copies
    if sizes and max(sizes) > budget:
        raise PipelineError(
            f"one layer, its hidden states and the head do not fit into {size_text(memory)}",
            where="--max_memory",
            mend=f"Allow {size_text(beside + copies * max(sizes))} or more, or use a smaller batch or dtype",
        )
    groups: list[list[LayerSource]] = []
    used = 0
    for source, size in zip(sources, sizes, strict=True):
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(source)
        used += size
    return groups


def working_bytes(compute: Compute, config: PreTrainedConfig, seqlen: int) -> int:
    """An upper estimate of what one layer's forward pass holds beside its weights, attention scores included."""
    tokens = compute.batch_size * seqlen
    width = 8 * config.hidden_size + 3 * config.intermediate_size
    mask = seqlen * seqlen if getattr(config, "sliding_window", None) else 0
    return tokens * width * max(4, compute.dtype.itemsize) + mask


class Backbone:
    """The model's own decoder without embedding and norm, in which layers come and go."""

    def __init__(self, config: PreTrainedConfig, compute: Compute) -> None:
        """Make it, with a PassLayer everywhere."""
        self.compute, self._config = compute, config
        self._model = empty_decoder(config, compute.device)
        self._model.layers = nn.ModuleList(PassLayer(i) for i in range(config.num_hidden_layers))
        self._model.norm = nn.Identity()
        self._model.eval()

    def resident(self, groups: Sequence[Sequence[LayerSource]]) -> Iterator[Sequence[LayerSource]]:
        """Make each group of layers resident in turn, and yield it. On a GPU the next one is copied meanwhile.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        if self.compute.device.type != "cuda":
            for group in groups:
                self._install([], [])
                self._install(group, self._build(group))
                yield group
            return
        copies = torch.cuda.Stream(self.compute.device)
        with ThreadPoolExecutor(1) as loader:
            waiting = loader.submit(self._build, groups[0], copies) if groups else None
            for group, following in zip(groups, [*groups[1:], None], strict=True):
                layers = waiting.result()
                here = torch.cuda.current_stream(self.compute.device)
                here.wait_stream(copies)
                for tensor in (t for layer in layers for t in layer.parameters()):
                    tensor.data.record_stream(here)
                self._install(group, layers)
                waiting = loader.submit(self._build, following, copies) if following else None
                yield group

    def _build(self, group: Sequence[LayerSource], copies: torch.cuda.Stream | None = None) -> list[nn.Module]:
        """Read layers onto the device; with a stream, through pinned memory and without waiting for the copies."""
        built = []
        for source in group:
            place = "cpu" if copies else self.compute.device
            layer = build_layer(self._config, source.index, source.checkpoint, self.compute.dtype, place)
            for adapter in source.adapters:
                adapter.wrap(layer, source.index)
            if copies:
                with torch.cuda.stream(copies):
                    for tensor in layer.parameters():
                        tensor.data = tensor.data.pin_memory().to(self.compute.device, non_blocking=True)
            built.append(layer)
        return built

    def _install(self, group: Sequence[LayerSource], layers: Sequence[nn.Module]) -> None:
        """Let exactly these layers be resident; PassLayers take the places of the others."""
        slots = self._model.layers
        for index, layer in enumerate(slots):
            if not isinstance(layer, PassLayer):
                slots[index] = PassLayer(index)
        for source, layer in zip(group, layers, strict=True):
            slots[source.index] = layer

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor, watch: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        """Run a batch, shape (n, seqlen, hidden), through the resident layers; positions start at 0.

        Args:
            hidden: what enters the first of them.
            watch: called after each of them with its index and the hidden states that leave it.
        """
        with ExitStack() as hooks:
            for index, layer in enumerate(self._model.layers if watch else ()):
                if not isinstance(layer, PassLayer):
                    hooks.callback(layer.register_forward_hook(_watching(watch, index)).remove)
            return self._model(inputs_embeds=hidden, use_cache=False).last_hidden_state


def _watching(watch: Callable[[int, torch.Tensor], None], index: int) -> Callable[..., None]:
    def hook(layer, inputs, hidden) -> None:
        watch(index, hidden)

    return hook


def build_norm(config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The norm between a model's last layer and its head, with its weights, in eval mode."""
    norm = empty_decoder(config).norm
    norm.load_state_dict({"weight": checkpoint.read("model.norm.weight", dtype).to(device)}, assign=True)
    return norm.eval().requires_grad_(False)


class Embedding:
    """A model's embedding table in its stored dtype; only the rows of a batch are cast."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._table, self._dtype = checkpoint.read("model.embed_tokens.weight"), dtype

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of token ids (n, seqlen): a CPU tensor (n, seqlen, hidden).

        Raises:
            DataError: an id that the model has no embedding for.
        """
        if len(self._table) <= (highest := int(ids.max())):
            raise DataError(
                f"the tokenizer gives the token id {highest}, and the model has {len(self._table)} embeddings",
                mend="Use the tokenizer that the model was trained with",
            )
        return self._table[ids.long()].to(self._dtype)


def embedding_bytes(model: Checkpoint, compute: Compute) -> int:
    """Memory on the compute device that the embedding takes: it stays on the CPU, in its stored dtype."""
    return 0 if compute.device.type == "cuda" else model.entries["model.embed_tokens.weight"].nbytes


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
        compute: device and batch size.
    """
    on_gpu = compute.device.type == "cuda"
    copies = torch.cuda.Stream(compute.device) if on_gpu else None

    def fetch(batch: int):
        first = batch * compute.batch_size
        hidden = read(first, min(first + compute.batch_size, windows))
        if not on_gpu:
            return hidden, None
        with torch.cuda.stream(copies):
            moved = hidden.pin_memory().to(compute.device, non_blocking=True)
            return moved, copies.record_event()

    with ThreadPoolExecutor(1) as reader:
        waiting = deque((batch, reader.submit(fetch, batch)) for batch in batches[:1])
        for following in [*batches[1:], None]:
            if not waiting:
                return
            batch, future = waiting.popleft()
            hidden, arrived = future.result()
            if following is not None:
                waiting.append((following, reader.submit(fetch, following)))
            if on_gpu:
                here = torch.cuda.current_stream(compute.device)
                here.wait_event(arrived)
                hidden.record_stream(here)
            yield batch, hidden


class DelayedStore:
    """Hands finished batches to a sink on the CPU; from a GPU each is copied back while the next one computes."""

    def __init__(self, sink: Callable[[int, torch.Tensor], None], compute: Compute) -> None:
        self._sink = sink
        self._copies = torch.cuda.Stream(compute.device) if compute.device.type == "cuda" else None
        self._pending: tuple | None = None

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Store a batch, soon."""
        if self._copies is None:
            self._sink(batch, hidden)
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
