"""Which columns a file has, by its header or its first row alone."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.storage.plain_file import open_plain
from mistral_prune_lora.text.rows import json_object, json_objects, missing_column, no_parquet, read_rows

_BLOCK_BYTES = 1 << 20


def check_column(path: Path, column: str) -> None:
    """Raise a DataError unless a file begins as one with a column of texts, by its header or its first row alone.

    A txt file has none, and a JSON array would have to be read whole: of both, nothing is asked.

    Args:
        path, column: as for `read_rows`.
    """
    if path.name.lower().endswith((".parquet", ".csv")):
        there = columns_of(path)
        if there is not None and column not in there:
            raise missing_column(path, column, there)
    elif not path.name.lower().endswith(".txt") and not _is_array(path):
        read_rows(path, column, limit=1)


def columns_of(path: Path) -> list[str] | None:
    """The columns of a file by its header or its first row alone; None of a txt file, and of a JSON array.

    Raises:
        DataError: it cannot be read, or is no file of its format.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_columns(path)
    if name.endswith(".csv"):
        with open_plain(path, DataError) as file:
            start = file.read(_BLOCK_BYTES).decode("utf-8", "replace").removeprefix("\ufeff")
        return next(csv.reader(io.StringIO(start, newline="")), [])
    if name.endswith(".txt") or _is_array(path):
        return None
    place, first = next(json_objects(path), ("the file", {}))
    return list(json_object(first, path, place))


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_plain(path, DataError) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            return file.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:  # whatever its readers make of a damaged file
        raise no_parquet(path, error) from None


def _is_array(path: Path) -> bool:
    """Whether a JSON file, plain or gzipped, begins as an array."""
    if not path.name.lower().endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        return False
    with ExitStack() as opened:
        file: BinaryIO | gzip.GzipFile = opened.enter_context(open_plain(path, DataError))
        if path.name.lower().endswith(".gz"):
            file = opened.enter_context(gzip.open(file, "rb"))
        try:
            return file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        except (OSError, EOFError, zlib.error):
            return False  # its reader says what is wrong
