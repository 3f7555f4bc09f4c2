"""Rows of text out of files: parquet, json, csv, txt, plain or gzipped, read directly and checked."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from mistral_prune_lora.digest import file_sha256
from mistral_prune_lora.errors import DataError

FORMATS = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".txt")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def read_rows(path: Path, column: str, *, limit: int | None = None) -> list[str]:
    """The texts of one file in order, rows without a value left out; a txt file is one row.

    Args:
        path: a file of one of FORMATS.
        column: the column or JSON key; a txt file has none.
        limit: read no further than this many rows.

    Raises:
        DataError: not readable, of another format, not UTF-8, or without that column (names those there are).
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            rows = _parquet_rows(path, column, limit)
        elif name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
            rows = _json_rows(path, column)
        elif name.endswith(".csv"):
            rows = _csv_rows(path, column)
        elif name.endswith(".txt"):
            rows = [read_text(path)]
        else:
            raise DataError("is of no format that is read here", where=path, mend=f"give one of {', '.join(FORMATS)}")
        return _only_text(islice(rows, limit), path, column)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from None
    except EOFError:
        raise DataError("the gzip file ends early", where=path, mend="fetch it again") from None


def read_text(path: Path) -> str:
    """A UTF-8 text file as it stands, line ends included; a leading byte order mark is left out.

    Raises:
        DataError: there is no such file, it is a folder, or it is not UTF-8 (names the byte).
    """
    try:
        return _decode(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path, mend="give a UTF-8 text file") from None


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 text file, each with its "\n"; other line separators of Unicode end no line.

    Raises:
        DataError: as for `read_text`.
    """
    return list(io.StringIO(read_text(path), newline="\n"))


def split_files(path: Path, split: str) -> list[Path]:
    """The files of one split: `path` itself if it is a file, else those of a folder whose names say so.

    A folder in which no name speaks of a split is one split, whichever is asked for.

    Raises:
        DataError: nothing to read in the folder, or other splits only (names them).
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(FORMATS))
    if not files:
        raise DataError("there is no file to read", where=path, mend=f"put one of {', '.join(FORMATS)} there")
    named = {file: split_named(file.name) for file in files}
    if not any(named.values()):
        return files
    chosen = [file for file in files if named[file] == split]
    if not chosen:
        raise missing_split(path, split, {name for name in named.values() if name})
    return chosen


def split_named(name: str) -> str | None:
    """The split that a file name speaks of ("c4-validation.00000-of-00008.json.gz": "validation"), or None."""
    found = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def missing_split(where: Path, split: str, there: Iterable[str]) -> DataError:
    """The error for a split that is not there, naming those that are."""
    return DataError(
        f"there is no {split} split, only {', '.join(sorted(there))}",
        where=where,
        mend="ask for one of those, or add it",
    )


def describe_files(paths: Sequence[Path]) -> str:
    """File names with their sha256, for provenance."""
    return ", ".join(f"{path.name} sha256={file_sha256(path)}" for path in paths)


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: byte {offset + error.start} is 0x{data[error.start]:02x}",
            where=path,
            mend="convert it, for example with iconv -t UTF-8",
        ) from None


def _parquet_rows(path: Path, column: str, limit: int | None) -> list[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _missing_column(path, column, file.schema_arrow.names)
            rows: list[object] = []
            for batch in file.iter_batches(columns=[column]):
                rows += batch.column(0).to_pylist()
                if limit is not None and len(rows) >= limit:
                    break
            return rows
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"is not a parquet file: {error}", where=path, mend="fetch it again") from None
    except UnicodeDecodeError as error:
        raise DataError(f"column {column} is not UTF-8: byte {error.start} of a row", where=path) from None


def _json_rows(path: Path, column: str) -> Iterator[object]:
    """JSON lines, or one JSON array of objects; lines are read only as far as they are asked for."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset)
            if number == 1 and text.lstrip().startswith("["):
                whole = _decode(line + file.read(), path)
                yield from (_value(row, column, path, "the array") for row in _parsed(whole, path, "the array"))
                return
            offset += len(line)
            if text.strip():
                yield _value(_parsed(text, path, f"line {number}"), column, path, f"line {number}")


def _parsed(text: str, path: Path, place: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}", where=path, mend="give one JSON object a line") from None


def _value(row: object, column: str, path: Path, place: str) -> object:
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object", where=path, mend="give one JSON object a line")
    if column not in row:
        raise _missing_column(path, column, row)
    return row[column]


def _csv_rows(path: Path, column: str) -> list[object]:
    table = csv.reader(io.StringIO(read_text(path), newline=""))
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # the limit of 131072 is shorter than a long document
    header = next(table, [])
    if column not in header:
        raise _missing_column(path, column, header)
    place = header.index(column)
    rows = []
    for row in table:
        if row and len(row) <= place:
            raise DataError(f"line {table.line_num} has no field for column {column}", where=path)
        rows += [row[place]] if row else []
    return rows


def _only_text(values: Iterable[object], path: Path, column: str) -> list[str]:
    rows = []
    for value in values:
        if isinstance(value, str):
            rows.append(value)
        elif value is not None:
            raise DataError(f"column {column} holds {type(value).__name__}, not text", where=path)
    return rows


def _missing_column(path: Path, column: str, there: Iterable[str]) -> DataError:
    return DataError(
        f"there is no column {column!r}, only {', '.join(map(repr, there)) or 'none at all'}",
        where=path,
        mend="name the column that holds the text",
    )
