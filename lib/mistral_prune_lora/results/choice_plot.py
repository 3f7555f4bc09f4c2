"""A figure of a choice of layers: what dropping each candidate costs, and what proxies say of it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from mistral_prune_lora.layout.partition import spans
from mistral_prune_lora.results.plots import BEST_COLOUR, OTHER_COLOUR, save_figure

_MOST_LABELS = 40
_KL = "KL from dense"
_PROXIES = {"angular_distance": "angular distance", "block_influence": "block influence"}


def plot_choice(table: pd.DataFrame, output: str | Path) -> None:
    """Draw every candidate's KL with its standard error, a panel for each kind of candidates; for blocks, the proxies.

    Args:
        table: as `choosing.choose.Choice` has it.
        output: the picture; its suffix decides the format.
    """
    kinds = list(table.groupby("kind", sort=False))
    proxies = [name for name in _PROXIES if table[name].notna().any()]
    count = len(kinds) + len(proxies)
    figure, axes = plt.subplots(count, 1, figsize=(7.5, 2.6 * count), squeeze=False, layout="constrained")
    places = iter(axes[:, 0])
    for kind, rows in kinds:
        _damage(next(places), str(kind), rows)
        for name in proxies if kind == "block" else ():
            _proxy(next(places), name, rows)
    save_figure(figure, output)


def _damage(axis, kind: str, rows: pd.DataFrame) -> None:
    if kind == "block":
        rows = rows.sort_values("dropped", key=lambda dropped: dropped.map(lambda words: int(words.split()[0])))
    named = rows.B if kind.startswith("split") else rows.dropped
    labels = [_span(words) for words in named]
    colours = [BEST_COLOUR if best else OTHER_COLOUR for best in rows.chosen]
    errors = rows.kl_dense_se.astype(float).fillna(0)
    axis.errorbar(range(len(rows)), rows.kl_dense, errors, fmt="none", ecolor="0.3", capsize=2, linewidth=0.8)
    axis.scatter(range(len(rows)), rows.kl_dense, color=colours, edgecolor="0.3", linewidth=0.4, zorder=2)
    if kind.startswith("split"):
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
    if len(labels) <= _MOST_LABELS:
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axis.set_ylabel(_KL)
    axis.set_title(f"{kind}, by B" if kind.startswith("split") else kind)


def _proxy(axis, name: str, rows: pd.DataFrame) -> None:
    for chosen, colour in ((False, OTHER_COLOUR), (True, BEST_COLOUR)):
        part = rows[rows.chosen == chosen]
        axis.scatter(part[name], part.kl_dense, color=colour, edgecolor="0.3", linewidth=0.4)
    picked = rows.sort_values(name).iloc[0]
    axis.annotate(
        f"picks {_span(picked.dropped)}",
        (picked[name], picked.kl_dense),
        textcoords="offset points",
        xytext=(6, 5),
        fontsize=8,
    )
    axis.set_yscale("log")
    axis.set_xlabel(_PROXIES[name])
    axis.set_ylabel(_KL)


def _span(words: str) -> str:
    """The layers of a candidate as people write them."""
    return spans(map(int, words.split()))
