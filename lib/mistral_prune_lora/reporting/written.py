"""The pages of a report, written from what was gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

import pandas as pd
import yaml

from mistral_prune_lora.reporting.front import front
from mistral_prune_lora.reporting.gathered import Gathered
from mistral_prune_lora.reporting.looks import STYLE
from mistral_prune_lora.reporting.making import (
    job_charts,
    jobs_of,
    ranking_chart,
    read_strength,
    strength_chart,
    training_chart,
)
from mistral_prune_lora.reporting.page import Figure, Section, write_page
from mistral_prune_lora.reporting.stages import POINTS, along_text_charts, kl_chart, perplexity_chart
from mistral_prune_lora.reporting.tables import searchable, unfolded
from mistral_prune_lora.storage.transaction import atomic_file

_PPL = (
    "A point is a stage's perplexity, with its 95 % interval; a line joins the stages of one variant. Dashed: the dense"
    " model. Hover for the numbers."
)
_KL = "How far a stage's predictions are from the dense model's, with 95 % intervals; 0 would be that model itself."
_ALONG = (
    "Each window's NLL less the dense model's on the same window: above 0 the stage predicts worse. A level line means"
    " that the damage is everywhere the same; peaks are passages that need what was cut."
)
_RANKING = (
    "Angular distance between what enters and what leaves each block of layers that could be dropped. The lowest block"
    " changes its input least."
)
_CURVE = (
    "The loss of each update (thin) and its mean over ten (thick), the divergence in it where it is not all of it, and"
    " points for what was found on held-out windows."
)
_STRENGTH = (
    "The Frobenius norm of what an adapter adds to a weight, over that of the weight, for each layer and projection. A"
    " layer without a field has no adapter there."
)
_JOBS = "From Snakemake's benchmark of each job; a job that was made in an earlier run counts with that run's time."


def write_pages(gathered: Gathered, benchmarks: str | Path, pages: Mapping[str, str | Path]) -> None:
    """Write every page.

    Args:
        gathered: what they are made of.
        benchmarks: the folder of Snakemake's benchmarks; jobs that ran without one are left out.
        pages: where to write "front" (HTML without a frame), "results", "stages", "layers", "training" and "jobs".
    """
    first = front(gathered)
    jobs = jobs_of(benchmarks, set(gathered.told.made), gathered.told.of_config)
    with atomic_file(pages["front"]) as fresh:
        fresh.write_text(f'<style>{STYLE}</style><div class="pages">{first}</div>\n', encoding="utf-8")
    write_page(pages["results"], "Pruned, healed, measured", [Section("What was done", first), *_tables(gathered)])
    write_page(pages["stages"], "Stages", list(_stages(gathered)))
    write_page(pages["layers"], "Layers and adapters", list(_layers(gathered)))
    write_page(pages["training"], "Trainings", list(_trainings(gathered)))
    write_page(pages["jobs"], "Time and memory", list(_jobs(jobs)))


def _tables(gathered: Gathered) -> Iterator[Section]:
    yield Section("All results", body=searchable(gathered.summary, "summary"))
    yield Section(
        "Comparisons",
        "<p>For each pair of results the mean NLL of the second less that of the first, window by window, in nats a"
        " token, with its 95 % interval. An interval without 0 is a difference.</p>",
        body=searchable(gathered.comparisons, "comparisons"),
    )
    settings = yaml.safe_dump(dict(gathered.told.config), sort_keys=False, allow_unicode=True)
    digests = "".join(
        unfolded(f"{experiment} on {dataset}, {variant} {stage}", _digests(record))
        for (experiment, dataset, variant, stage), record in gathered.results.items()
    )
    yield Section(
        "Behind the numbers",
        body=unfolded("Configuration, with all defaults", f"<pre>{escape(settings)}</pre>")
        + unfolded("Layers and digests of every result", digests),
    )


def _digests(record: Mapping) -> str:
    rows: list[tuple[str, object]] = [
        ("protocol", record.get("protocol")),
        ("text", record.get("text", {}).get("sha256")),
        ("token ids", record.get("ids_sha256")),
        ("tokenizer", record.get("tokenizer", {}).get("sha256")),
        ("pruning", record.get("pruning_identity")),
        ("all weights", record.get("weights_sha256")),
    ]
    rows += [(f"weights: {name}", digest) for name, digest in record.get("weights", {}).items()]
    steps = [f"layers {step.get('layers')} on {step.get('device')}" for step in record.get("steps", [])]
    rows.append(("runs of layers", "; ".join(steps)))
    told = "".join(f"<li>{escape(name)}: <code>{escape(str(value))}</code></li>" for name, value in rows if value)
    return f"<ul>{told}</ul>"


def _stages(gathered: Gathered) -> Iterator[Section]:
    for experiment, dataset in gathered.measured:
        rows = gathered.rows(experiment, dataset)
        figures = [Figure("Perplexity by stage", _PPL, perplexity_chart(rows))]
        kl = kl_chart(rows)
        if kl is not None:
            figures.append(Figure("Divergence from the dense model", _KL, kl))
        along = along_text_charts(gathered, experiment, dataset)
        averaged = f" Each point is a mean over neighbouring windows, at most {POINTS} in all." if _many(rows) else ""
        captions = [_ALONG + averaged] + ["The same at this stage."] * 2
        figures += [
            Figure(f"Along the text, {stage}", caption, chart)
            for caption, (stage, chart) in zip(captions, along.items(), strict=False)
        ]
        yield Section(f"{experiment} on {dataset}", figures=figures)


def _many(rows: pd.DataFrame) -> bool:
    return bool((rows.windows > POINTS).any())


def _layers(gathered: Gathered) -> Iterator[Section]:
    rankings = gathered.told.rankings
    for experiment, told in gathered.told.experiments.items():
        figures = []
        if experiment in rankings:
            figures.append(Figure("Ranking of blocks", _RANKING, ranking_chart(rankings[experiment])))
        parts: dict[str, list[pd.DataFrame]] = {}
        for named, labelled, path in gathered.told.adapters:
            if named == experiment:
                variant, part = labelled.split(".")
                parts.setdefault(variant, []).append(read_strength(path, part))
        figures += [
            Figure(f"Strength of the adapters, {variant}", _STRENGTH, strength_chart(pd.concat(tables)))
            for variant, tables in parts.items()
        ]
        lead = f"<p>Layers: {escape(told['layers'])}.</p>" if "layers" in told else ""
        if experiment not in rankings:
            lead += (
                '<p class="plain">Blocks of layers were not ranked; <code>snakemake results/'
                f"{escape(experiment)}/importance.svg</code> does it, where the experiment says on which text.</p>"
            )
        yield Section(experiment, lead, figures)


def _trainings(gathered: Gathered) -> Iterator[Section]:
    named: dict[str, list[Figure]] = {}
    for experiment, label, path in gathered.told.trainings:
        named.setdefault(experiment, []).append(Figure(f"Adapter of {label}", _CURVE, training_chart(path)))
    for experiment, figures in named.items():
        yield Section(experiment, figures=figures)
    if not named:
        yield Section("No adapter was trained here", "<p>All of them were given, or nothing was healed.</p>")


def _jobs(jobs: pd.DataFrame) -> Iterator[Section]:
    if jobs.empty:
        yield Section("No job left a benchmark", "<p>Snakemake keeps them in <code>benchmarks/</code>.</p>")
        return
    charts = job_charts(jobs)
    figures = [Figure("Time", _JOBS, charts["time"]), Figure("Memory", _MEMORY, charts["memory"])]
    total = jobs.seconds.sum()
    yield Section(f"{len(jobs)} jobs, {total / 60:.1f} minutes of work", figures=figures, body=searchable(jobs, "jobs"))


_MEMORY = "The largest resident set of one job. Snakemake looks every few seconds, so that a short peak can be missed."
