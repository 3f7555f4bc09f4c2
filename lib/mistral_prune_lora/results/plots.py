"""Figures: perplexity by stage, the course of trainings, and what every block of layers changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.results.summary_file import read_results, read_table
from mistral_prune_lora.storage.transaction import atomic_file

_STYLE = {
    "pruned": ("o", "#b5651d"),
    "merged": ("s", "#1f6f8b"),
    "no-kd": ("^", "#8a6fb0"),
    "joint-AB": ("D", "#5b8c3e"),
    "joint-FULL": ("D", "#5b8c3e"),
}
BEST_COLOUR, OTHER_COLOUR = "#1f6f8b", "#b9c6cc"  # of what is recommended or chosen, and of the rest
_SMOOTHED = 10  # updates that the line of a training's loss is a mean over


def plot_perplexity(summary: str | Path, output: str | Path) -> None:
    """Draw PPL by stage, one panel for each dataset and experiment, one line a variant, the dense model as a rule.

    Args:
        summary: summary.csv.
        output: the picture; its suffix decides the format.

    Raises:
        DataError: the summary cannot be read.
    """
    table = read_results(summary, ("experiment", "dataset", "variant", "stage", "ppl", "ppl_se"))
    panels = list(table.groupby(["dataset", "experiment"], sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, ((dataset, experiment), rows) in zip(axes[0], panels, strict=True):
        _panel(axis, rows)
        axis.set_title(f"{experiment} on {dataset}")
    axes[0][0].set_ylabel("perplexity (log scale)")
    save_figure(figure, output)


def plot_training(curves: Mapping[str, str | Path], output: str | Path) -> None:
    """Draw the loss of every update of some trainings, one panel each, and what was found on held-out windows.

    Args:
        curves: their training.csv by what they are called; held_out.csv is read where it lies beside.
        output: the picture; its suffix decides the format.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.2), squeeze=False, layout="constrained")
    for axis, (name, path) in zip(axes[0], curves.items(), strict=True):
        _curve(axis, Path(path))
        axis.set_title(name)
    axes[0][0].set_ylabel("nats a token")
    save_figure(figure, output)


def _curve(axis, path: Path) -> None:
    table = pd.read_csv(path)
    parts = {"loss": ("loss", "#1f6f8b"), "kl": ("divergence from the teacher", "#b5651d")}
    for column, (label, colour) in parts.items():
        if table[column].isna().all():
            continue
        axis.plot(table.step, table[column], color=colour, alpha=0.25, linewidth=0.8)
        smooth = table[column].rolling(_SMOOTHED, min_periods=1).mean()
        axis.plot(table.step, smooth, color=colour, label=f"{label}, mean of {_SMOOTHED}")
    looks = path.with_name("held_out.csv")
    if looks.is_file():
        found = pd.read_csv(looks)
        column, label = ("mean_nll", "NLL") if found.kl.isna().all() else ("kl", "KL from dense")
        axis.plot(found.step, found[column], marker="o", color="#5b8c3e", label=f"{label}, held out")
    axis.set_xlabel("update")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)


def plot_importance(ranking: str | Path, output: str | Path) -> None:
    """Draw a ranking of blocks as bars by the block's first layer, the recommended one marked.

    Args:
        ranking: importance.csv.
        output: the picture; its suffix decides the format.

    Raises:
        DataError: the ranking cannot be read.
    """
    table = read_table(ranking, ("start", "end", "angular_distance", "recommended"))
    figure, axis = plt.subplots(figsize=(0.28 * len(table) + 2, 3.4), layout="constrained")
    colours = [BEST_COLOUR if best else OTHER_COLOUR for best in table.recommended]
    axis.bar(table.start, table.angular_distance, color=colours)
    best = table[table.recommended].iloc[0]
    axis.set_title(f"least change: layers {best.start}-{best.end}")
    axis.set_xlabel(f"first layer of the block of {best.end - best.start + 1}")
    axis.set_ylabel("angular distance")
    save_figure(figure, output)


def _panel(axis, rows: pd.DataFrame) -> None:
    for variant, (marker, colour) in _STYLE.items():
        line = rows[rows.variant == variant].set_index("stage").reindex(STAGES).dropna(subset="ppl")
        if line.empty:
            continue
        places = [STAGES.index(stage) for stage in line.index]
        axis.errorbar(places, line.ppl, line.ppl_se, marker=marker, color=colour, capsize=3, label=variant)
        for place, ppl in zip(places, line.ppl, strict=True):
            axis.annotate(f"{ppl:.1f}", (place, ppl), textcoords="offset points", xytext=(6, 5), fontsize=8)
    for ppl in rows[rows.variant == "dense"].ppl:
        axis.axhline(ppl, color="0.4", linestyle="--", label=f"dense, {ppl:.1f}")
    axis.set_xticks(range(len(STAGES)), STAGES)
    axis.set_xlim(-0.3, len(STAGES) - 0.6)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())
    ticks = sorted({float(f"{ppl:.2g}") for ppl in rows.ppl})
    axis.set_yticks(ticks[:: max(1, len(ticks) // 6)])
    axis.set_xlabel("stage")
    axis.legend(frameon=False, fontsize=8)


def save_figure(figure: Figure, output: str | Path) -> None:
    """Write a figure, whole or not at all; fixed metadata and ids: the same numbers give the same bytes."""
    with atomic_file(output) as fresh, matplotlib.rc_context({"svg.hashsalt": "mistral-prune-lora"}):
        figure.savefig(fresh, dpi=150, metadata={"Date": None} if fresh.suffix == ".svg" else None)
    plt.close(figure)
