"""Differences between experiments: each result beside that of a baseline, window by window. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results.statistics import paired_difference
from mistral_prune_lora.results.summary_file import AGAIN, read_results
from mistral_prune_lora.storage.plain_file import check_plain
from mistral_prune_lora.storage.transaction import atomic_file

COLUMNS = ("experiment", "baseline", "dataset", "first", "second", "difference", "low", "high", "ppl_ratio")
_READ = ("experiment", "dataset", "variant", "stage", "ids_sha256", "weights_sha256", "mean_nll")

Result = tuple[str, str, str, str]  # experiment, dataset, variant, stage


def write_baseline(
    summary_csv: str | Path, windows: Mapping[Result, str | Path], baselines: Mapping[str, str], out_csv: str | Path
) -> list[str]:
    """Write `baseline_differences` of a summary.csv; arguments and errors as there.

    Returns:
        A line for each result that could not be compared.
    """
    table, left_out = baseline_differences(read_results(summary_csv, _READ), windows, baselines)
    with atomic_file(out_csv) as fresh:
        table.to_csv(fresh, index=False)
    return left_out


def baseline_differences(
    summary: pd.DataFrame, windows: Mapping[Result, str | Path], baselines: Mapping[str, str]
) -> tuple[pd.DataFrame, list[str]]:
    """How much each result exceeds the same one of its experiment's baseline: dataset, variant and stage of one name.

    Args:
        summary: rows of summary.csv.
        windows: the parquet file with the NLL of each window, for each result.
        baselines: the baseline of each experiment that has one.

    Returns:
        COLUMNS: `first` is the baseline's result and `second` the experiment's, as variant.stage; then what
        `statistics.paired_difference` says of them. What both measured on one model, and have one number for, is left
        out. And a line for each result that cannot be compared: its baseline lacks it, or has other token ids.

    Raises:
        DataError: a file of windows cannot be read, or is of another number of windows than its baseline's.
        NumberError: as `paired_difference`.
    """
    rows = {_key(row): row for row in summary.to_dict("records")}
    found, left_out = [], []
    for key, row in rows.items():
        experiment, *result = key
        if experiment not in baselines:
            continue
        baseline = baselines[experiment]
        other = (baseline, *result)
        named = f"{experiment}, {result[0]}, {result[1]}.{result[2]}"
        if other not in rows:
            left_out.append(f"{named}: {baseline} has no such result")
        elif rows[other]["ids_sha256"] != row["ids_sha256"]:
            left_out.append(f"{named}: {baseline} was measured on other token ids")
        elif not _is_one_model(rows[other], row):
            told = paired_difference(*(_nll_per_token(Path(windows[place])) for place in (other, key)))
            names = dict.fromkeys(("first", "second"), f"{result[1]}.{result[2]}")
            found.append({"experiment": experiment, "baseline": baseline, "dataset": result[0], **names, **told})
    return pd.DataFrame(found, columns=list(COLUMNS)), left_out


def _key(row: Mapping) -> Result:
    return row["experiment"], row["dataset"], row["variant"], row["stage"]


def _is_one_model(first: Mapping, second: Mapping) -> bool:
    """Whether two results are of the same weights and have the same NLL: there is nothing to compare."""
    same = first.get("weights_sha256"), second.get("weights_sha256")
    return isinstance(same[0], str) and bool(same[0]) and same[0] == same[1] and first["mean_nll"] == second["mean_nll"]


def _nll_per_token(path: Path) -> np.ndarray:
    check_plain(path, DataError, mend=AGAIN)
    try:
        table = pd.read_parquet(path, columns=["nll", "tokens"])
        nll = (table.nll / table.tokens).to_numpy(dtype=float)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"cannot be read as the windows of a result: {error}", where=path, mend=AGAIN) from None
    if not np.isfinite(nll).all():
        raise DataError("the NLL of a window is NaN or infinity", where=path, mend=AGAIN)
    return nll
