"""Results as evaluations write them, made by hand, and the pages of a report from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from mistral_prune_lora.reporting.gathered import Gathered, Told, gather
from mistral_prune_lora.reporting.written import write_pages
from mistral_prune_lora.results.statistics import WindowScores, summarise
from mistral_prune_lora.results.summary import Named, write_summary

STAGES = {"A": 4, "AB": 6, "FULL": 8}
PAGES = ("results", "stages", "layers", "training", "jobs")
PREDICTED = 10  # tokens of a window
DENSE, OTHER = "d" * 64, "e" * 64


def write_result(
    folder: Path, place: tuple[str, str, str, str], windows: int, *, kl: float | None = None, **changes
) -> Named:
    """A result of (experiment, dataset, variant, stage) and the scores of its windows beside it.

    Args:
        folder: where the experiments' folders are.
        place: which result it is.
        windows: how many windows it has.
        kl: of every window, in nats a token; None makes some up, or none of the dense model.
        changes: of the record.
    """
    experiment, dataset, variant, stage = place
    random = np.random.default_rng([*map(ord, variant + stage)])
    worse = {"dense": 0.0, "pruned": 1.0}.get(variant, 0.4) if stage != "FULL" else 0.0
    made_up = None if variant == "dense" else PREDICTED * (0.1 + worse) * random.uniform(0.8, 1.2, windows)
    kls = made_up if kl is None else np.full(windows, PREDICTED * kl)
    nll = PREDICTED * (3 + worse + np.sin(np.arange(windows)) / 4 + random.uniform(-0.1, 0.1, windows))
    dense = stage == "FULL" and variant in ("dense", "pruned")
    scores = WindowScores(nll, np.full(windows, 4.0), kls, None if kls is None else np.full(windows, 6.0))
    record = {
        "stage": stage, "label": f"{variant}[{stage}]", "active_layers": STAGES[stage], "parameters": 1000,
        **summarise(scores, predicted_per_window=PREDICTED, tokens_per_byte=0.25),
        "seqlen": PREDICTED + 1, "dtype": "fp32", "device": "cpu", "batch_size": 4, "ids_sha256": "1" * 64,
        "text": {"dataset": dataset, "sha256": "2" * 64}, "tokenizer": {"sha256": "3" * 64},
        "weights_sha256": DENSE if dense else f"{len(variant + stage):064}",
        "weights": {"layers.000": "5" * 64}, "steps": [{"device": "cpu", "layers": [0, 1]}],
    }  # fmt: skip
    path = folder / experiment / "ppl" / dataset / f"{variant}.{stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | changes))
    scores.save(path.with_suffix(".parquet"), PREDICTED)
    return Named(*place, path=path)


def write_results(folder: Path, experiment: str, windows: int, dataset: str = "text", **changes) -> list[Named]:
    """The seven results of an experiment: dense, and pruned and merged at three stages."""
    places = [("dense", "FULL"), *((variant, stage) for variant in ("pruned", "merged") for stage in STAGES)]
    return [write_result(folder, (experiment, dataset, *place), windows, **changes) for place in places]


def gathered(folder: Path, results: list[Named], told: Told | None = None, merges: Mapping | None = None) -> Gathered:
    """What pages are made of, from the tables that the workflow would write."""
    write_summary(results, folder / "summary.csv", folder / "comparisons.csv", merges)
    return gather(folder / "summary.csv", folder / "comparisons.csv", results, told or Told({}, {}))


def told_everything(folder: Path) -> Told:
    """What the experiment "whole" was told and made: a ranking, two adapters, two trainings, jobs."""
    blocks = pd.DataFrame(
        {"start": range(1, 7), "end": range(2, 8), "angular_distance": [0.5, 0.3, 0.2, 0.3, 0.4, 0.6]}
    )
    blocks = blocks.assign(rank=blocks.angular_distance.rank(method="first").astype(int))
    blocks.assign(recommended=blocks["rank"] == 1).to_csv(folder / "importance.csv", index=False)
    for part, layers in (("A", [0, 1, 2, 7]), ("B", [3, 4])):
        rows = [(i, name, 4, 0.1 * i, 2.0, 0.05 * i) for i in layers for name in ("self_attn.q_proj", "mlp.down_proj")]
        columns = ["layer", "module", "rank", "delta_norm", "weight_norm", "strength"]
        pd.DataFrame(rows, columns=columns).to_csv(folder / f"{part}.csv", index=False)
        (folder / part).mkdir()
        steps = np.arange(1, 31)
        training = pd.DataFrame({"step": steps, "loss": 3 / steps, "kl": 2 / steps, "ce": 9 / steps})
        training.to_csv(folder / part / "training.csv", index=False)
    held = pd.DataFrame({"step": [0, 15, 30], "ppl": [30, 20, 15], "mean_nll": [3.4, 3, 2.7], "kl": [1, 0.5, 0.4]})
    held.to_csv(folder / "A" / "held_out.csv", index=False)
    for rule, job, seconds, memory in (
        ("merge_A", "A-1", 3.5, "120.5"), ("merge_A", "gone", 9, "9"), ("perplexity", "A-2", 2, "-"),
    ):  # fmt: skip
        path = folder / "benchmarks" / rule / f"{job}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:03\t{memory}\n")
    return Told(
        experiments={"whole": {"model": "<b>tiny</b>", "layers": "A 0-2, 7; B 3-4; C 5-6"}, "plain": {"model": "tiny"}},
        config={"experiments": {"whole": {"seed": 1}}},
        adapters=[("whole", f"merged.{part}", str(folder / f"{part}.csv")) for part in "AB"],
        trainings=[("whole", part, str(folder / part / "training.csv")) for part in "AB"],
        rankings={"whole": str(folder / "importance.csv")},
        made=["A-1", "A-2"],
    )


def write_whole_report(folder: Path) -> dict[str, Path]:
    """Every page, by its name: an experiment with everything over many windows, and one of a single window."""
    results = write_results(folder, "whole", 250) + write_results(folder, "plain", 1, dataset="short")
    pages = {name: folder / f"{name}.html" for name in ("front", *PAGES)}
    write_pages(gathered(folder, results, told_everything(folder)), folder / "benchmarks", pages)
    return pages
