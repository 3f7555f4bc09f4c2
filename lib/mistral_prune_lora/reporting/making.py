"""Charts of how it was made: ranking of blocks, trainings, strength of adapters, time and memory of jobs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import altair as alt
import pandas as pd

from mistral_prune_lora.reporting.charts import BLUE, BROWN, GREEN, finished
from mistral_prune_lora.results.summary_file import read_table

_PAGES = "report_pages"  # the rule that writes these
_SMOOTHED = 10  # updates that a line of a training is a mean over
_LIGHT = "#b9c6cc"
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STRENGTH = ("layer", "module", "rank", "delta_norm", "weight_norm", "strength")
RANKING = ("start", "end", "angular_distance", "rank", "recommended")


def ranking_chart(path: str | Path) -> dict:
    """What every block of layers changes, the least of them marked."""
    table = read_table(path, RANKING)[list(RANKING)]
    table["what"] = ["least change" if best else "other blocks" for best in table.recommended]
    kinds = alt.Scale(domain=["least change", "other blocks"], range=[BLUE, _LIGHT])
    chart = alt.Chart(table).mark_bar().encode(
        x=alt.X("start:O", title="first layer of the block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("angular_distance:Q", title="angular distance"),
        color=alt.Color("what:N", scale=kinds),
        tooltip=["start", "end", "rank", alt.Tooltip("angular_distance", format=".4f")],
    )  # fmt: skip
    return finished(chart)


def training_chart(path: str | Path) -> dict:
    """The loss of every update and its running mean, the divergence in it, and what held-out windows told.

    Args:
        path: training.csv; held_out.csv is read where it lies beside.
    """
    path = Path(path)
    table = read_table(path, ("step", "loss", "kl"))
    named = {"loss": table.loss, "divergence": table.kl if not table.kl.equals(table.loss) else None}
    parts = [
        pd.DataFrame({"step": table.step, "raw": column, "series": name, "value": _smooth(column)})
        for name, column in named.items()
        if column is not None and column.notna().any()
    ]
    looks = path.with_name("held_out.csv")
    if looks.is_file():
        found = read_table(looks, ("step", "mean_nll", "kl"))
        column = "mean_nll" if found.kl.isna().all() else "kl"
        parts.append(pd.DataFrame({"step": found.step, "series": f"held out: {column}", "value": found[column]}))
    whole = pd.concat(parts)
    names = list(dict.fromkeys(whole.series))
    colours = alt.Scale(domain=names, range=[BLUE, BROWN, GREEN][: len(names)])
    told = [alt.Tooltip("value", format=".4f"), alt.Tooltip("raw", title="of this update", format=".4f")]
    base = alt.Chart(whole).encode(
        x=alt.X("step:Q", title="update", axis=alt.Axis(tickMinStep=1, format="d")),
        color=alt.Color("series:N", sort=names, scale=colours),
        tooltip=["series", "step", *told],
    )  # fmt: skip
    y = alt.Y("value:Q", title="nats a token", scale=alt.Scale(zero=False))
    lines = [
        base.mark_line(strokeWidth=0.8, opacity=0.3).encode(y=alt.Y("raw:Q", title="nats a token")),
        base.mark_line(strokeWidth=2).encode(y=y),
    ]
    if held := [name for name in names if "held" in name]:
        points = base.transform_filter(alt.FieldOneOfPredicate("series", held))
        lines.append(points.mark_point(filled=True, size=60).encode(y=y))
    return finished(alt.layer(*lines), 220)


def strength_chart(table: pd.DataFrame) -> dict:
    """How much adapters change every weight, layers from left to right, a row a projection."""
    shown = table.assign(module=table.module.str.rsplit(".", n=1).str[-1])
    order = [name for name in _MODULES if name in set(shown.module)]
    order += sorted(set(shown.module) - set(order))
    chart = alt.Chart(shown).mark_rect().encode(
        x=alt.X("layer:O", title="layer of the dense model", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("module:N", sort=order, title=None),
        color=alt.Color(
            "strength:Q",
            scale=alt.Scale(scheme="viridis", type="sqrt"),  # a root tells those apart that change little
            legend=alt.Legend(title="|delta| / |weight|", gradientLength=160, format=".1%", tickCount=3),
        ),
        tooltip=["part", "layer", "module", "rank", alt.Tooltip("strength", format=".3%"),
                 alt.Tooltip("delta_norm", format=".4g"), alt.Tooltip("weight_norm", format=".4g")],
    )  # fmt: skip
    return finished(chart, max(80, 26 * len(order)))


def read_strength(path: str | Path, part: str) -> pd.DataFrame:
    """A table of strengths, with the part that the adapter is for."""
    return read_table(path, STRENGTH).assign(part=part)


def jobs_of(folder: str | Path, made: Collection[str], of_config: str = "") -> pd.DataFrame:
    """Every job of which Snakemake kept time and memory: rule, seconds, peak_mb (NaN where it was too short), job.

    Jobs of other configurations lie there too, and are left out; so is the one that writes the pages, which has not
    ended when it reads this.

    Args:
        folder: benchmarks. Those of jobs for one artefact lie below, in a folder a rule; those of jobs for the whole
            configuration, such as the summary's, lie in it.
        made: names of this configuration's artefacts, models and experiments. A job bears one of them, and behind a dot
            what of it the job made: a shard, or an exported stage.
        of_config: what stands behind the rule in the names of this configuration's own files.
    """
    found = [(path.parent.name, path) for path in sorted(Path(folder).glob("*/*.tsv")) if _artefact(path) in made]
    for path in sorted(Path(folder).glob("*.tsv")):
        rule, dot, config = path.stem.partition(".")
        if dot + config == of_config and rule != _PAGES:
            found.append((rule, path))
    rows = []
    for rule, path in found:
        if path.stat().st_size:  # else its job is about to write it
            table = read_table(path, ("s", "max_rss"))
            memory = pd.to_numeric(table.max_rss, errors="coerce").max()
            rows.append((rule, float(table.s.sum()), float(memory), path.stem))
    return pd.DataFrame(rows, columns=["rule", "seconds", "peak_mb", "job"])


def job_charts(jobs: pd.DataFrame) -> dict[str, dict]:
    """The seconds that a rule's jobs took in all, and the most memory that one of them held."""
    grouped = jobs.groupby("rule", as_index=False)
    table = grouped.agg(jobs=("job", "size"), seconds=("seconds", "sum"), peak_mb=("peak_mb", "max"))
    order = table.sort_values("seconds", ascending=False).rule.tolist()

    def bars(column: str, title: str, colour: str) -> dict:
        chart = alt.Chart(table).mark_bar(color=colour).encode(
            y=alt.Y("rule:N", sort=order, title=None, axis=alt.Axis(labelLimit=170)),
            x=alt.X(f"{column}:Q", title=title, axis=alt.Axis(tickCount=4)),
            tooltip=["rule", "jobs", alt.Tooltip("seconds", format=".1f"), alt.Tooltip("peak_mb", format=".0f")],
        )  # fmt: skip
        return finished(chart, max(80, 24 * len(table)))

    return {"time": bars("seconds", "seconds, all jobs of the rule", BLUE),
            "memory": bars("peak_mb", "peak memory of a job, MB", BROWN)}  # fmt: skip


def _artefact(benchmark: Path) -> str:
    """Whose job left a benchmark; no artefact's name has a dot."""
    return benchmark.name.split(".")[0]


def _smooth(column: pd.Series) -> pd.Series:
    return column.rolling(_SMOOTHED, min_periods=1).mean()
