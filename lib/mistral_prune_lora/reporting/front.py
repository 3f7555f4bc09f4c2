"""The front page: what was done, how to read it, the results with intervals, and what makes them doubtful."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

import pandas as pd

from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.reporting.charts import with_intervals
from mistral_prune_lora.reporting.doubts import doubts_of
from mistral_prune_lora.reporting.gathered import Gathered
from mistral_prune_lora.reporting.tables import plain
from mistral_prune_lora.results.summary_file import VARIANTS

_DONE = """<p>A dense language model was cut into a model <b>A</b> that starts fast and two bundles of layers,
<b>B</b> and <b>C</b>, that can be restored later. LoRA adapters, trained to answer as the dense model does, heal what
the cut broke, and are merged into their parts. Measured is the perplexity of three stages: A alone, AB with B restored,
FULL with both; before healing (<i>pruned</i>) and after it (<i>merged</i>), on the same windows of text.</p>"""

_HOW = """<ul><li><b>Perplexity</b> (PPL) is e to the mean negative log-likelihood of a token, in nats; less is better.
Only results on the same token ids can be compared.</li>
<li><b>In brackets</b> is a 95 % interval (Student's t over windows). Two results share their windows, so intervals that
overlap may still differ: the table of comparisons has the interval of each difference, window by window.</li>
<li><b>KL</b> is the divergence from the dense model's predictions, in nats a token; 0 would be the dense model.</li>
</ul>"""


def front(gathered: Gathered) -> str:
    """The front page as HTML without a frame: what was done, doubts, results, how to read them."""
    doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in doubts_of(gathered))
    warned = f'<div class="doubts"><b>Before you believe the numbers</b><ul>{doubts}</ul></div>' if doubts else ""
    described = "".join(_described(name, told) for name, told in gathered.told.experiments.items())
    return f"{_DONE}{warned}<h3>Results</h3>{results_table(gathered.summary)}{described}<h3>How to read it</h3>{_HOW}"


def _described(name: str, told: Mapping[str, str]) -> str:
    rows = "".join(f"<li>{escape(what)}: {escape(words)}</li>" for what, words in told.items())
    return f"<h3>{escape(name)}</h3><ul>{rows}</ul>"


def results_table(summary: pd.DataFrame) -> str:
    """A row an experiment, dataset and stage; for each variant PPL with its interval, and KL where it is known."""
    table = with_intervals(summary)
    shown = [variant for variant in VARIANTS if variant in set(table.variant)]
    compared = {v for v in shown if v != "dense" and table[table.variant == v].kl_dense.notna().any()}
    heads = ["experiment", "dataset", "stage", "layers"]
    for variant in shown:
        heads += [f"{variant} PPL", *([f"{variant} KL"] if variant in compared else [])]
    rows = []
    for experiment, dataset in dict.fromkeys(zip(table.experiment, table.dataset, strict=True)):
        for stage in STAGES:
            here = table[(table.experiment == experiment) & (table.dataset == dataset) & (table.stage == stage)]
            if here.empty:
                continue
            cells: list[str | tuple[str, str]] = [experiment, dataset, stage, f"{here.iloc[0].active_layers:.0f}"]
            for variant in shown:
                found = here[here.variant == variant]
                cells.append(_interval(found.iloc[0], "ppl", "low", "high") if len(found) else "")
                if variant in compared:
                    cells.append(_interval(found.iloc[0], "kl_dense", "kl_low", "kl_high") if len(found) else "")
            rows.append(cells)
    return plain(heads, rows, 3)


def _interval(row: pd.Series, value: str, low: str, high: str) -> str | tuple[str, str]:
    """A number and its interval, `12.34` and `[11.90, 12.80]`; the number alone where there is none."""
    if not math.isfinite(row[value]):
        return ""
    if not math.isfinite(row[low]):
        return _short(row[value])
    return _short(row[value]), f"[{_short(row[low])}, {_short(row[high])}]"


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"
