"""Which block of layers changes its input least: angular distances of every block that could be dropped."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import torch

from mistral_prune_lora.console import progress
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.model import load_model
from mistral_prune_lora.prune import split_block
from mistral_prune_lora.transaction import atomic_file


def last_token_states(
    model_dir: str | Path,
    ids: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    max_batches: int | None = None,
) -> torch.Tensor:
    """The hidden state of each window's last token before every layer and after the last.

    Args:
        model_dir: the dense model.
        ids: calibration windows, int64, each of shape (1, seqlen).
        dtype, device: of the forward pass.
        max_batches: look at so many windows at most.

    Returns:
        float32, shape (layers + 1, windows, hidden), on the CPU; before the final norm.
    """
    device = resolve_device(device)
    model = load_model(model_dir, dtype=dtype, device=device)
    seen: list[list[torch.Tensor]] = []

    def keep_input(_, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[-1].append(hidden[0, -1].float().cpu())

    def keep_output(_, args, kwargs, output):
        seen[-1].append(output[0, -1].float().cpu())

    layers = model.model.layers
    handles = [layer.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(keep_output, with_kwargs=True))
    chosen = list(ids)[:max_batches]
    with progress(total=len(chosen), description="calibrate", unit="window") as bar, torch.inference_mode():
        for window in chosen:
            seen.append([])
            model.model(window.to(device), use_cache=False)
            bar.update()
    for handle in handles:
        handle.remove()
    return torch.stack([torch.stack(states) for states in seen], dim=1)


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
