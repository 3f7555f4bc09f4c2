"""What a sweep over seeds says: mean and standard deviation of each result over the seeds. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results.summary_file import read_results
from mistral_prune_lora.storage.transaction import atomic_file

SEED = "distill.seed"
MEASURES = ("ppl", "mean_nll", "kl_dense")
_RESULT = ["experiment", "values", "dataset", "variant", "stage"]
COLUMNS = (*_RESULT, "n", "seeds", *(f"{name}_{what}" for name in MEASURES for what in ("mean", "sd")))

Sweeps = Mapping[str, tuple[str, Mapping[str, object]]]


def write_seeds(summary_csv: str | Path, sweeps: Sweeps, out_csv: str | Path) -> None:
    """Write `seed_statistics` of a summary.csv; arguments and errors as there."""
    table = seed_statistics(read_results(summary_csv, (*_RESULT[:1], *_RESULT[2:], *MEASURES, "ids_sha256")), sweeps)
    with atomic_file(out_csv) as fresh:
        table.to_csv(fresh, index=False)


def seed_statistics(summary: pd.DataFrame, sweeps: Sweeps) -> pd.DataFrame:
    """Mean and standard deviation over the experiments of a sweep that differ in `distill.seed` alone.

    Args:
        summary: rows of summary.csv.
        sweeps: for each experiment that a sweep has made, the experiment with the sweep and the values by dotted key
            (`expansion.Expansion.sweeps`).

    Returns:
        COLUMNS: the experiment with the sweep; the values of its other keys as JSON, empty if there are none; the
        result; how many seeds there are and which; for each of MEASURES its mean and its standard deviation (n - 1),
        which is empty for a single seed, as both are where a seed has no such number.

    Raises:
        DataError: the results of two seeds are of different token ids.
    """
    rows = []
    for row in summary.to_dict("records"):
        base, values = sweeps.get(row["experiment"], ("", {}))
        if SEED in values:
            others = {key: value for key, value in values.items() if key != SEED}
            told = json.dumps(others, sort_keys=True) if others else ""
            rows.append({**row, "experiment": base, "values": told, "seed": values[SEED]})
    table = pd.DataFrame(rows, columns=[*summary.columns, "values", "seed"])
    found = []
    for key, group in table.groupby(_RESULT, sort=False):
        if group.ids_sha256.nunique(dropna=False) > 1:
            raise DataError(
                f"the seeds of {', '.join(str(word) for word in key if word)} were measured on different token ids",
                mend="evaluate them again with one tokenizer, seqlen and text",
            )
        numbers = group[list(MEASURES)].astype(float)
        mean, deviation = numbers.mean(skipna=False), numbers.std(ddof=1, skipna=False)
        spread = {f"{m}_{what}": of[m] for m in MEASURES for what, of in (("mean", mean), ("sd", deviation))}
        seeds = " ".join(map(str, group.seed))
        found.append({**dict(zip(_RESULT, key, strict=True)), "n": len(group), "seeds": seeds, **spread})
    return pd.DataFrame(found, columns=list(COLUMNS))
