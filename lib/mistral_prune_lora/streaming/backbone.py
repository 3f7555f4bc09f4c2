"""The model's own decoder, in which layers come and go.

The model's own class runs the layers, with a PassLayer wherever none is resident and neither embedding nor final norm:
positions, rotary embedding and attention mask are made by the code that makes them in the whole model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedConfig

from mistral_prune_lora.models.architecture import empty_decoder
from mistral_prune_lora.models.load import build_layer
from mistral_prune_lora.models.pass_layer import PassLayer
from mistral_prune_lora.streaming.compute import Compute, LayerSource


class Backbone:
    """The model's own decoder without embedding and norm, in which layers come and go."""

    def __init__(self, config: PreTrainedConfig, compute: Compute) -> None:
        """Make it, with a PassLayer everywhere."""
        self.compute, self._config = compute, config
        self._model = empty_decoder(config, compute.device)
        self._layers = nn.ModuleList(PassLayer(i) for i in range(config.num_hidden_layers))
        self._model.layers = self._layers
        self._model.norm = nn.Identity()
        self._model.eval()

    def resident(self, groups: Sequence[Sequence[LayerSource]]) -> Iterator[Sequence[LayerSource]]:
        """Make each group of layers resident in turn, and yield it. On a GPU the next one is copied meanwhile, so that
        two groups are held there at once.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        if not self.compute.copies_meanwhile:
            for group in groups:
                self._install([], [])
                self._install(group, self._build(group))
                yield group
            return
        copies = torch.cuda.Stream(self.compute.device)
        with ThreadPoolExecutor(1) as loader:
            waiting = deque(loader.submit(self._build, group, copies) for group in groups[:1])
            for group, following in zip(groups, [*groups[1:], None], strict=True):
                layers = waiting.popleft().result()
                here = torch.cuda.current_stream(self.compute.device)
                here.wait_stream(copies)
                for tensor in (t for layer in layers for t in layer.parameters()):
                    tensor.data.record_stream(here)
                self._install(group, layers)
                if following is not None:
                    waiting.append(loader.submit(self._build, following, copies))
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
        slots = self._layers
        for index, layer in enumerate(slots):
            if not isinstance(layer, PassLayer):
                slots[index] = PassLayer(index)
        for source, layer in zip(group, layers, strict=True):
            slots[source.index] = layer

    @torch.inference_mode()
    def __call__(
        self,
        hidden: torch.Tensor,
        watch: Callable[[int, torch.Tensor], None] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run a batch, shape (n, seqlen, hidden), through the resident layers.

        Args:
            hidden: what enters the first of them.
            watch: called after each of them with its index and the hidden states that leave it.
            positions: of the tokens in their documents, integers, shape (n, seqlen): the model's own code keeps
                documents apart by them. None counts each row from 0.
        """
        told = {} if positions is None else {"position_ids": positions.long().to(hidden.device)}
        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                if watch and not isinstance(layer, PassLayer):
                    hooks.callback(layer.register_forward_hook(_watching(watch, index)).remove)
            return self._model(inputs_embeds=hidden, use_cache=False, **told).last_hidden_state


def _watching(watch: Callable[[int, torch.Tensor], None], index: int) -> Callable[..., None]:
    def hook(layer, inputs, hidden) -> None:
        watch(index, hidden)

    return hook
