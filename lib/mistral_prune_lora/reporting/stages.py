"""Charts of what was measured: perplexity and KL by stage, and the difference to the dense model along the text."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.reporting.charts import by_stage, by_variant, finished, with_intervals
from mistral_prune_lora.reporting.gathered import Gathered

POINTS = 200  # of a line along the text; more windows than that are averaged over neighbours


def perplexity_chart(rows: pd.DataFrame) -> dict:
    """PPL by stage on a log scale, a line a variant, with intervals; the dense model as a level.

    Args:
        rows: the summary's, of one experiment and dataset.
    """
    table = with_intervals(rows)
    columns = ["variant", "stage", "ppl", "low", "high", "mean_nll", "windows"]
    dense, others = table[table.variant == "dense"][columns], table[table.variant != "dense"][columns]
    scale = alt.Scale(type="log", nice=False, padding=12)
    layers = [_level(dense, table, scale)] if len(dense) else []
    if len(others):
        layers += _points(others, table, "ppl", "perplexity (log scale)", scale)
    return finished(alt.layer(*layers))


def kl_chart(rows: pd.DataFrame) -> dict | None:
    """KL from the dense model by stage, a line a variant, with intervals; None where it was not compared with."""
    table = with_intervals(rows)
    table = table[(table.variant != "dense") & table.kl_dense.notna()]
    if table.empty:
        return None
    table = table.assign(low=table.kl_low, high=table.kl_high)[
        ["variant", "stage", "kl_dense", "low", "high", "windows"]
    ]
    scale = alt.Scale(zero=True, nice=True)
    return finished(alt.layer(*_points(table, table, "kl_dense", "KL from dense, nats a token", scale)))


def along_text_charts(gathered: Gathered, experiment: str, dataset: str) -> dict[str, dict]:
    """For each stage, the NLL of every window less the dense model's, a line a variant; {} without a dense result.

    Where there are more windows than POINTS, each point is a mean over as many neighbours as it takes.
    """
    dense = gathered.windows.get((experiment, dataset, "dense", "FULL"))
    if dense is None:
        return {}
    charts = {}
    for stage in STAGES:
        parts = [
            _differences(table, dense).assign(variant=key[2])
            for key, table in gathered.windows.items()
            if key[:2] == (experiment, dataset) and key[3] == stage and key[2] != "dense"
        ]
        if parts:
            charts[stage] = _along_text(pd.concat(parts))
    return charts


def _differences(table: pd.DataFrame, dense: pd.DataFrame) -> pd.DataFrame:
    """`first` and `last` window of each point, and the mean difference over them, in nats a token."""
    difference = (table.nll / table.tokens).to_numpy() - (dense.nll / dense.tokens).to_numpy()
    group = np.arange(len(difference)) // -(-len(difference) // POINTS)
    frame = pd.DataFrame({"window": table.window.to_numpy(), "difference": difference}).groupby(group)
    return frame.agg(first=("window", "min"), last=("window", "max"), difference=("difference", "mean"))


def _along_text(table: pd.DataFrame) -> dict:
    ticks, scale = alt.Axis(tickMinStep=1, format="d"), alt.Scale(nice=False)
    base = alt.Chart(table).encode(
        x=alt.X("first:Q", title="window of the text", axis=ticks, scale=scale),
        y=alt.Y("difference:Q", title="NLL less dense, nats a token"),
        color=by_variant(table),
        tooltip=["variant", alt.Tooltip("first", title="from window"), alt.Tooltip("last", title="to window"),
                 alt.Tooltip("difference", format="+.4f")],
    )  # fmt: skip
    level = alt.Chart(pd.DataFrame({"y": [0.0]})).mark_rule(color="#555").encode(y="y:Q")
    return finished(alt.layer(level, base.mark_line(strokeWidth=1.5), base.mark_circle(size=22)), 200)


def _level(dense: pd.DataFrame, all_rows: pd.DataFrame, scale: alt.Scale) -> alt.Chart:
    tooltip = [
        "variant",
        alt.Tooltip("ppl", format=".3f"),
        alt.Tooltip("low", format=".3f"),
        alt.Tooltip("high", format=".3f"),
    ]
    rule = alt.Chart(dense).mark_rule(strokeDash=[6, 4], strokeWidth=2)
    return rule.encode(y=alt.Y("ppl:Q", scale=scale), color=by_variant(all_rows), tooltip=tooltip)


def _points(table: pd.DataFrame, all_rows: pd.DataFrame, value: str, title: str, scale: alt.Scale) -> list[alt.Chart]:
    """Lines, points and their intervals, side by side where they would lie over each other."""
    shown = list(dict.fromkeys(table.variant))
    base = alt.Chart(table).encode(
        x=by_stage(),
        xOffset=alt.XOffset("variant:N", sort=shown),
        color=by_variant(all_rows),
        tooltip=["variant", "stage", alt.Tooltip(value, format=".4f"), alt.Tooltip("low", format=".4f"),
                 alt.Tooltip("high", format=".4f"), "windows"],
    )  # fmt: skip
    ticks = alt.Axis(tickCount=6)
    y = alt.Y(f"{value}:Q", title=title, scale=scale, axis=ticks)
    layers = [base.mark_line(strokeWidth=1.2, opacity=0.6).encode(y=y)]
    if np.isfinite(table[["low", "high"]]).all(axis=1).any():  # of a single window there is none
        low = alt.Y("low:Q", title=title, scale=scale, axis=ticks)
        layers.append(base.mark_rule(strokeWidth=2).encode(y=low, y2="high:Q"))
    return [*layers, base.mark_point(filled=True, size=80, opacity=1).encode(y=y)]
