"""What all charts have in common: colours, one size for all, and how far a bar of error reaches."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd

from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.results.summary_file import VARIANTS

LEVEL = 0.95  # of every interval
BLUE, BROWN, GREEN, GREY = "#1f6f8b", "#b5651d", "#5b8c3e", "#8a949a"
COLOURS = {
    "dense": GREY,
    "pruned": BROWN,
    "merged": BLUE,
    "no-kd": "#8a6fb0",
    "joint-AB": GREEN,
    "joint-FULL": "#c08a00",
}
HEIGHT = 260
_TEXT = 12


def finished(chart: alt.TopLevelMixin, height: int = HEIGHT) -> dict:
    """A chart's Vega-Lite specification: as wide as its place on the page, with its legend above it."""
    size = alt.AutoSizeParams(type="fit-x", contains="padding")
    words: dict[str, Any] = {"labelFontSize": _TEXT, "titleFontSize": _TEXT, "titleFontWeight": "normal"}
    return (
        chart.properties(width="container", height=height, autosize=size)
        .configure(font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(gridColor="#e8ecee", labelOverlap="greedy", **words)
        .configure_legend(orient="top", title=None, labelFontSize=_TEXT, symbolSize=90, symbolOpacity=1, columns=3)
        .to_dict()
    )


def by_variant(table: pd.DataFrame) -> alt.Color:
    """The colour of a variant, the same on every chart; of those that a table has."""
    shown = [variant for variant in VARIANTS if variant in set(table.variant)]
    return alt.Color("variant:N", sort=shown, scale=alt.Scale(domain=shown, range=[COLOURS[name] for name in shown]))


def by_stage(title: str = "stage") -> alt.X:
    """Stages from left to right, in their order."""
    return alt.X("stage:N", sort=list(STAGES), title=title, axis=alt.Axis(labelAngle=0), scale=alt.Scale(padding=0.5))


def half_width(error: pd.Series, windows: pd.Series) -> pd.Series:
    """Half of Student's t interval around means over windows, from their standard errors; NaN for a single window."""
    from scipy.special import stdtrit

    half = [
        e * float(stdtrit(n - 1, (1 + LEVEL) / 2)) if n > 1 else math.nan for e, n in zip(error, windows, strict=True)
    ]
    return pd.Series(half, index=error.index, dtype=float)


def with_intervals(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the summary with `low` and `high` of the perplexity, and `kl_low`, `kl_high` where there is a KL.

    The perplexity's interval is that of the mean NLL, raised to e: it lies unevenly around it.
    """
    half = half_width(rows.mean_nll_se, rows.windows)
    kl = half_width(rows.kl_dense_se, rows.windows)
    return rows.assign(
        low=(rows.mean_nll - half).map(math.exp),
        high=(rows.mean_nll + half).map(_exp),
        kl_low=rows.kl_dense - kl,
        kl_high=rows.kl_dense + kl,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
