"""Rows of text out of files: parquet, json, csv, txt, plain or gzipped, read directly and checked."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.plain_file import check_plain, open_plain

if TYPE_CHECKING:
    from _csv import Reader  # what csv.reader returns; csv itself has no name for it

FORMATS = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".txt")
MAX_TEXT_BYTES = 1 << 30  # of one file, unpacked; a file of C4 has 0.8 GB, all of WikiText-103 has 0.5 GB
MAX_ROWS = 20_000_000  # of one file, empty ones included
_LONGEST_LINE = 64 << 20  # bytes of JSON
_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 4096  # of a parquet file, in which a small dictionary can stand for any amount of text
_HALF_PAIR = re.compile("[\ud800-\udfff]")
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
        DataError: not readable, of another format, not UTF-8, without that column (names those there are), or of more
            than MAX_TEXT_BYTES or MAX_ROWS.
    """
    name = path.name.lower()
    rows: Iterable[object]
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
    except (EOFError, zlib.error):
        raise DataError("the gzip file ends early or is damaged", where=path, mend="fetch it again") from None


def check_column(path: Path, column: str) -> None:
    """Raise a DataError unless a file begins as one with a column of texts, by its header or its first row alone.

    A txt file has none, and a JSON array would have to be read whole: of both, nothing is asked.

    Args:
        path, column: as for `read_rows`.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        _parquet_columns(path, column)
    elif name.endswith(".csv"):
        with open_plain(path, DataError) as file:
            start = file.read(_BLOCK_BYTES).decode("utf-8", "replace").removeprefix("\ufeff")
        header = next(csv.reader(io.StringIO(start, newline="")), [])
        if column not in header:
            raise _missing_column(path, column, header)
    elif not name.endswith(".txt") and not _is_array(path):
        read_rows(path, column, limit=1)


def _parquet_columns(path: Path, column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_plain(path, DataError) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            if column not in file.schema_arrow.names:
                raise _missing_column(path, column, file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError) as error:  # whatever its readers make of a damaged file
        raise _no_parquet(path, error) from None


def _no_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"is not a parquet file: {error}", where=path, mend="fetch it again")


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


def read_text(path: Path) -> str:
    """A UTF-8 text file as it stands, line ends included; a leading byte order mark is left out.

    Raises:
        DataError: there is no such file; it is a folder, a pipe or a device; it has more than MAX_TEXT_BYTES; or it is
            not UTF-8, or holds NUL (names the byte).
    """
    content = io.BytesIO()
    try:
        with open_plain(path, DataError, mend="give a UTF-8 text file") as file:
            for block in _blocks(file, path):
                content.write(block)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path, mend="give a UTF-8 text file") from None
    return _decode(content.getbuffer(), path)


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 text file, each with its "\n"; other line separators of Unicode end no line.

    Raises:
        DataError: as for `read_text`.
    """
    text = read_text(path)
    if text.count("\n") > MAX_ROWS:
        raise _too_many_rows(path)
    return list(io.StringIO(text, newline="\n"))


def split_files(path: Path, split: str) -> list[Path]:
    """The files of one split: `path` itself if it is a file, else those of a folder whose names say so.

    A folder in which no name speaks of a split is one split, whichever is asked for.

    Raises:
        DataError: nothing to read in the folder, or other splits only (names them).
    """
    if not path.is_dir():
        check_plain(path, DataError, mend="give a file or a folder")
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


def _blocks(file: BinaryIO | gzip.GzipFile, path: Path, done: int = 0) -> Iterator[bytes]:
    """The rest of a file in blocks, of which a hole or a bomb shows in the first.

    Args:
        file: at byte `done` of its content, unpacked.
        path: for the error.
        done: bytes of it that have been read.
    """
    while block := file.read(_BLOCK_BYTES):
        _refuse_nul(block, path, done)
        done += len(block)
        if done > MAX_TEXT_BYTES:
            raise _too_much_text(path)
        yield block


def _refuse_nul(data: bytes, path: Path, offset: int) -> None:
    if (place := data.find(b"\0")) >= 0:
        raise DataError(
            f"is no text: byte {offset + place} is NUL",
            where=path,
            mend="give a UTF-8 text; of UTF-16, iconv makes one",
        )


def _too_much_text(path: Path) -> DataError:
    return DataError(
        f"holds more than {MAX_TEXT_BYTES >> 20} MiB of text, the most that is read here",
        where=path,
        mend="give a part of it",
    )


def _too_many_rows(path: Path) -> DataError:
    return DataError(f"holds more than {MAX_ROWS} rows, the most that are read here", where=path, mend="give a part")


def _decode(data: bytes | memoryview, path: Path, offset: int = 0) -> str:
    try:
        return str(data, "utf-8").removeprefix("\ufeff" if offset == 0 else "")
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
        with open_plain(path, DataError) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            if column not in file.schema_arrow.names:
                raise _missing_column(path, column, file.schema_arrow.names)
            rows: list[object] = []
            nbytes = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
                rows += batch.column(0).to_pylist()
                nbytes += batch.nbytes
                if nbytes > MAX_TEXT_BYTES:
                    raise _too_much_text(path)
                if len(rows) > MAX_ROWS:
                    raise _too_many_rows(path)
                if limit is not None and len(rows) >= limit:
                    break
            return rows
    except (pyarrow.ArrowException, OSError) as error:  # whatever its readers make of a damaged file
        raise _no_parquet(path, error) from None
    except UnicodeDecodeError as error:
        raise DataError(f"column {column} is not UTF-8: byte {error.start} of a row", where=path) from None


def _json_rows(path: Path, column: str) -> Iterator[object]:
    """JSON lines, or one JSON array of objects; lines are read only as far as they are asked for."""
    with ExitStack() as opened:
        file: BinaryIO | gzip.GzipFile = opened.enter_context(open_plain(path, DataError))
        if path.name.lower().endswith(".gz"):
            file = opened.enter_context(gzip.open(file, "rb"))
        offset = number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            _refuse_nul(line, path, offset)
            if number == 1 and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                whole = _decode(b"".join((line, *_blocks(file, path, len(line)))), path)
                yield from (_value(row, column, path, "the array") for row in _parsed(whole, path, "the array"))
                return
            if len(line) > _LONGEST_LINE:
                raise DataError(
                    f"line {number} is longer than {_LONGEST_LINE >> 20} MiB, the most that is read",
                    where=path,
                    mend="give one JSON object a line",
                )
            text = _decode(line, path, offset)
            offset += len(line)
            if offset > MAX_TEXT_BYTES:
                raise _too_much_text(path)
            if number > MAX_ROWS:
                raise _too_many_rows(path)
            if text.strip():
                yield _value(_parsed(text, path, f"line {number}"), column, path, f"line {number}")


def _parsed(text: str, path: Path, place: str) -> Any:
    # Not by the rules of json_file: what other columns hold, NaN for example, is not for this pipeline to judge.
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{place} is nested too deeply", where=path, mend="give one JSON object a line") from None
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}", where=path, mend="give one JSON object a line") from None


def _value(row: object, column: str, path: Path, place: str) -> object:
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object", where=path, mend="give one JSON object a line")
    if column not in row:
        raise _missing_column(path, column, row)
    return row[column]


def _csv_rows(path: Path, column: str) -> list[str]:
    table = csv.reader(io.StringIO(read_text(path), newline=""))
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # the limit of 131072 is shorter than a long document
    try:
        return _column_of(table, column, path)
    except csv.Error as error:
        raise DataError(f"line {table.line_num} is no CSV: {error}", where=path) from None


def _column_of(table: Reader, column: str, path: Path) -> list[str]:
    header = next(table, [])
    if column not in header:
        raise _missing_column(path, column, header)
    place = header.index(column)
    rows = []
    for row in table:
        if row and len(row) <= place:
            raise DataError(f"line {table.line_num} has no field for column {column}", where=path)
        rows += [row[place]] if row else []
        if len(rows) > MAX_ROWS:
            raise _too_many_rows(path)
    return rows


def _only_text(values: Iterable[object], path: Path, column: str) -> list[str]:
    rows = []
    for number, value in enumerate(values, start=1):
        if isinstance(value, str):
            if _HALF_PAIR.search(value):  # as a JSON escape; in UTF-8 there is none
                raise DataError(f"row {number} of column {column} holds half a surrogate pair", where=path)
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
