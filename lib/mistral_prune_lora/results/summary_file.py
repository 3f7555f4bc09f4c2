"""Reading summary.csv, comparisons.csv and other tables of the workflow again. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.storage.plain_file import check_plain

AGAIN = "delete it and run again"  # what mends a file of results
VARIANTS = ("dense", "pruned", "merged", "no-kd", "joint-AB", "joint-FULL")
_WORDS = (
    "experiment", "dataset", "variant", "stage", "label", "dtype", "device", "ids_sha256", "weights_sha256", "warnings",
    "first", "second",
)  # fmt: skip


def read_results(path: str | Path, columns: Iterable[str]) -> pd.DataFrame:
    """The rows of a summary.csv or comparisons.csv: numbers as float64, NaN where there is none, and words as text.

    Args:
        path: the file.
        columns: those that must be there.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    check_plain(path, DataError, mend=AGAIN)
    try:
        # As text first: an experiment called 1 or null has that name.
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        for name in table.columns.difference(list(_WORDS), sort=False):
            table[name] = pd.to_numeric(table[name].replace("", None)).astype(float)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as a table of results: {error}", where=path, mend=AGAIN) from None
    check_columns(table, columns, path)
    return table


def read_table(path: str | Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A table of this workflow: parquet, CSV or, as Snakemake writes its benchmarks, TSV.

    Args:
        path: the file; its suffix says which.
        columns: those that must be there.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    path = Path(path)
    check_plain(path, DataError, mend=AGAIN)
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as a table: {error}", where=path, mend=AGAIN) from None
    check_columns(table, columns, path)
    return table


def check_columns(table: pd.DataFrame, columns: Iterable[str], path: str | Path) -> None:
    """Raise a DataError unless a table that was read from a file has some columns."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise DataError(f"has no column {missing[0]}", where=path, mend=AGAIN)
