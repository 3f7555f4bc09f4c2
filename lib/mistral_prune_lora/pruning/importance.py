"""Which block of layers changes its input least: angular distances of every block that could be dropped."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import torch
from tqdm import tqdm

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.console import progress
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.errors import LayoutError, PipelineError
from mistral_prune_lora.models.load import model_config
from mistral_prune_lora.pruning.cut import split_block
from mistral_prune_lora.storage.activations import ActivationReader, ActivationWriter
from mistral_prune_lora.storage.transaction import atomic_file, scratch_directory
from mistral_prune_lora.streaming.layers import (
    Backbone,
    Compute,
    DelayedStore,
    Embedding,
    LayerSource,
    embedding_bytes,
    resident_groups,
    stream_batches,
)


def last_token_states(
    model_dir: str | Path,
    ids: torch.Tensor,
    *,
    beside: str | Path,
    dtype: torch.dtype,
    device: str = "cpu",
    batch_size: int = 1,
    max_memory: int | None = None,
) -> torch.Tensor:
    """The hidden state of each window's last token before every layer and after the last.

    Layers are streamed: as many are in memory as may be, and never all of them have to. Where they go in several
    groups, the windows' hidden states lie in files between two of them.

    Args:
        model_dir: the dense model.
        ids: calibration windows, integers, shape (windows, seqlen).
        beside: what is being made of the result; those files lie beside it while this runs.
        dtype, device, batch_size: of the forward pass.
        max_memory: bytes to use on the device; None means a share of what is free.

    Returns:
        float32, shape (layers + 1, windows, hidden), on the CPU; before the final norm.

    Raises:
        CheckpointError: weights are missing or do not fit.
        DataError: an id that the model has no embedding for.
        PipelineError: memory or disk space does not suffice; the model overflows.
    """
    compute = Compute(resolve_device(device), dtype, batch_size, max_memory)
    model = open_checkpoint(model_dir)
    config, embedding = model_config(model), Embedding(model, dtype)
    layers = [LayerSource(index, model) for index in range(config.num_hidden_layers)]
    groups = resident_groups(layers, compute, config, ids.shape[1], embedding_bytes(model, compute))
    seen = _LastTokens(torch.empty(len(layers) + 1, len(ids), config.hidden_size))
    seen(-1, embedding(ids[:, -1:]))
    backbone = Backbone(config, compute)
    with (
        scratch_directory(beside) as scratch,
        progress(total=ids.numel() * len(groups), description="calibrate", unit="tok", unit_scale=True) as bar,
    ):
        read, former = lambda first, last: embedding(ids[first:last]), None
        for group in backbone.resident(groups):
            kept = None if group is groups[-1] else scratch / f"{group[-1].index}.safetensors"
            _run_group(backbone, read, ids.shape, seen, kept, bar)
            if former:
                former.unlink()
            if kept:
                read, former = ActivationReader(kept).read, kept
    return seen.states


class _LastTokens:
    """Collects the last token's hidden states of the batch that is running.

    Attributes:
        states: float32, shape (layers + 1, windows, hidden); row i + 1 is what leaves layer i.
        first: the number of the batch's first window.
    """

    def __init__(self, states: torch.Tensor) -> None:
        self.states, self.first = states, 0

    def __call__(self, layer: int, hidden: torch.Tensor) -> None:
        """Take what leaves a layer, shape (n, tokens, hidden).

        Raises:
            PipelineError: NaN or infinity, which would be ranked as no change at all.
        """
        last = hidden[:, -1].float().cpu()
        if not torch.isfinite(last).all():
            raise PipelineError(
                f"the hidden states that leave layer {layer} hold NaN or infinity",
                where="--dtype",
                mend="use bf16 or fp32, whose range is wider than that of fp16; if that is no help, check the weights",
            )
        self.states[layer + 1, self.first : self.first + len(hidden)] = last


def _run_group(
    backbone: Backbone,
    read: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    seen: _LastTokens,
    kept: Path | None,
    bar: tqdm,
) -> None:
    """Run all windows, shape (windows, seqlen), through the resident layers; keep their hidden states in a file."""
    compute, (windows, seqlen) = backbone.compute, shape
    with ExitStack() as held:
        writer = store = None
        if kept:
            hidden_shape = (windows, seqlen, seen.states.shape[-1])
            writer = held.enter_context(ActivationWriter(kept, hidden_shape, compute.dtype, compute.batch_size, {}))
            store = DelayedStore(writer.write, compute)
        for batch, hidden in stream_batches(read, range(math.ceil(windows / compute.batch_size)), windows, compute):
            seen.first = batch * compute.batch_size
            hidden = backbone(hidden, seen)
            if store:
                store.put(batch, hidden)
            bar.update(len(hidden) * seqlen)
        if writer:
            store.flush()
            writer.finish()


def angular_distances(
    states: torch.Tensor, block: int, *, keep_last_layer: bool = True, all_blocks: bool = True
) -> pd.DataFrame:
    """The angular distance between what enters and what leaves every legal block of consecutive layers.

    distance = arccos(mean over windows of the cosine) / pi, at the last token, after Gromov et al. 2024
    (https://arxiv.org/abs/2403.17887, section 3.2), who average the angles where this averages the cosines.

    Args:
        states: as `last_token_states` gives them.
        block: layers in a block.
        keep_last_layer: leave out blocks that hold the last layer.
        all_blocks: of L layers, block starts are 0 to L - block, and to L - block - 1 with `keep_last_layer`. False
            leaves the last of them out: the original scripts measure what leaves a block as the input of the layer
            after it, which the last block has not, and take one more from the end with `keep_last_layer`.

    Returns:
        One row a block, by start: start, end (inclusive), angular_distance, rank (1 is the smallest), recommended,
        B and C (the layers each would hold with the block split in half).

    Raises:
        LayoutError: no block of that size is legal.
    """
    count = len(states) - 1
    starts = range(count - block + 1 - keep_last_layer - (not all_blocks))
    if block < 1 or not starts:
        raise LayoutError(
            f"no block of {block} layers can be dropped from {count}", mend="drop fewer layers, at least one"
        )
    states = states.double()
    rows = []
    for start in starts:
        cosine = torch.nn.functional.cosine_similarity(states[start], states[start + block], dim=-1).mean().item()
        b, c = split_block(start, block)
        distance = math.acos(max(-1.0, min(1.0, cosine))) / math.pi
        rows.append((start, start + block - 1, distance, " ".join(map(str, b)), " ".join(map(str, c))))
    table = pd.DataFrame(rows, columns=["start", "end", "angular_distance", "B", "C"])
    table.insert(3, "rank", table.angular_distance.rank(method="first").astype(int))
    table.insert(4, "recommended", table["rank"] == 1)
    return table


def write_importance(table: pd.DataFrame, output: str | Path) -> None:
    """Write a ranking as CSV, whole or not at all."""
    with atomic_file(output) as fresh:
        table.to_csv(fresh, index=False)


def plot_importance(table: pd.DataFrame, output: str | os.PathLike) -> None:
    """Draw the ranking as bars by block start, the recommended block marked; the suffix of `output` sets the format."""
    figure, axis = plt.subplots(figsize=(0.28 * len(table) + 2, 3.4), layout="constrained")
    colours = ["#1f6f8b" if best else "#b9c6cc" for best in table.recommended]
    axis.bar(table.start, table.angular_distance, color=colours)
    best = table[table.recommended].iloc[0]
    axis.set_title(f"least change: layers {best.start}-{best.end}")
    axis.set_xlabel(f"first layer of the block of {best.end - best.start + 1}")
    axis.set_ylabel("angular distance")
    # Fixed metadata and ids: the same numbers give the same bytes.
    with atomic_file(output) as fresh, matplotlib.rc_context({"svg.hashsalt": "importance"}):
        figure.savefig(fresh, dpi=150, metadata={"Date": None} if fresh.suffix == ".svg" else None)
    plt.close(figure)
