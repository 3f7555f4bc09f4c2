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
from mistral_prune_lora.storage.plain_file import open_plain

if TYPE_CHECKING:
    from _csv import Reader  # what csv.reader returns; csv itself has no name for it

FORMATS = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".txt")
MAX_TEXT_BYTES = 1 << 30  # of one file, unpacked; a file of C4 has 0.8 GB, all of WikiText-103 has 0.5 GB
MAX_ROWS = 20_000_000  # of one file, empty ones included
_LONGEST_LINE = 64 << 20  # bytes of JSON
_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 4096  # of a parquet file, in which a small dictionary can stand for any amount of text
_HALF_PAIR = re.compile("[\ud800-\udfff]")


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
            raise _no_format(path)
        return _only_text(islice(rows, limit), path, column)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from None
    except (EOFError, zlib.error):
        raise _damaged_gzip(path) from None


def no_parquet(path: Path, error: Exception) -> DataError:
    """The error for what a reader of parquet files could not read."""
    return DataError(f"is not a parquet file: {error}", where=path, mend="fetch it again")


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
    rows: list[object] = []
    for batch in parquet_batches(path, [column]):
        rows += [row[column] for row in batch]
        if limit is not None and len(rows) >= limit:
            break
    return rows


def parquet_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[list[dict]]:
    """The rows of a parquet file in order, some at a time: of some of its columns, or of all.

    Raises:
        DataError: not such a file, without one of the columns, or of more than MAX_TEXT_BYTES or MAX_ROWS.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open_plain(path, DataError) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            for column in columns or ():
                if column not in file.schema_arrow.names:
                    raise missing_column(path, column, file.schema_arrow.names)
            nbytes = count = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                rows = batch.to_pylist()
                nbytes, count = nbytes + batch.nbytes, count + len(rows)
                if nbytes > MAX_TEXT_BYTES:
                    raise _too_much_text(path)
                if count > MAX_ROWS:
                    raise _too_many_rows(path)
                yield rows
    except (pyarrow.ArrowException, OSError) as error:  # whatever its readers make of a damaged file
        raise no_parquet(path, error) from None
    except UnicodeDecodeError as error:
        told = f"column {columns[0]}" if columns and len(columns) == 1 else "a column"
        raise DataError(f"{told} is not UTF-8: byte {error.start} of a row", where=path) from None


def _json_rows(path: Path, column: str) -> Iterator[object]:
    return (_value(row, column, path, place) for place, row in json_objects(path))


def json_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON file with their places in words: of each line, or the items of the one array that it is.

    Lines are read only as far as they are asked for.

    Raises:
        DataError: not JSON, not UTF-8, or more than MAX_TEXT_BYTES or MAX_ROWS.
    """
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
                yield from (("the array", row) for row in _parsed(whole, path, "the array"))
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
            if not text.strip():
                continue
            value = _parsed(text, path, f"line {number}") if number > 1 else _first_value(text, file, path)
            yield f"line {number}", value


def _first_value(line: str, file: BinaryIO | gzip.GzipFile, path: Path) -> Any:
    """The value of a first line, or of the whole file where an object is spread over its lines."""
    try:
        return _parsed(line, path, "line 1")
    except DataError as error:
        if not line.lstrip().startswith("{"):
            raise
        done = len(line.encode())
        try:
            return _parsed(line + _decode(b"".join(_blocks(file, path, done)), path, done), path, "the object")
        except DataError:
            raise error from None


def _parsed(text: str, path: Path, place: str) -> Any:
    # Not by the rules of json_file: what other columns hold, NaN for example, is not for this pipeline to judge.
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{place} is nested too deeply", where=path, mend="give one JSON object a line") from None
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}", where=path, mend="give one JSON object a line") from None


def _value(row: object, column: str, path: Path, place: str) -> object:
    known = json_object(row, path, place)
    if column not in known:
        raise missing_column(path, column, known)
    return known[column]


def json_object(row: object, path: Path, place: str) -> dict:
    """A row that is a JSON object; DataError if it is another JSON value."""
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object", where=path, mend="give one JSON object a line")
    return row


def read_records(path: Path) -> Iterator[dict]:
    """The rows of one file in order, each with all of its columns; a txt file is one row with the column "text".

    Args:
        path: a file of one of FORMATS.

    Raises:
        DataError: as for `read_rows`.
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            for batch in parquet_batches(path):
                yield from batch
        elif name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
            yield from (json_object(row, path, place) for place, row in json_objects(path))
        elif name.endswith(".csv"):
            yield from _csv_records(path)
        elif name.endswith(".txt"):
            yield {"text": read_text(path)}
        else:
            raise _no_format(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from None
    except (EOFError, zlib.error):
        raise _damaged_gzip(path) from None


def _no_format(path: Path) -> DataError:
    return DataError("is of no format that is read here", where=path, mend=f"give one of {', '.join(FORMATS)}")


def _damaged_gzip(path: Path) -> DataError:
    return DataError("the gzip file ends early or is damaged", where=path, mend="fetch it again")


def _csv_table(path: Path) -> Reader:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # the limit of 131072 is shorter than a long document
    return csv.reader(io.StringIO(read_text(path), newline=""))


def _csv_records(path: Path) -> Iterator[dict]:
    table = _csv_table(path)
    try:
        header = next(table, [])
        for row in table:
            if row and len(row) != len(header):
                raise DataError(
                    f"line {table.line_num} has {len(row)} fields, and the header {len(header)}", where=path
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"line {table.line_num} is no CSV: {error}", where=path) from None


def _csv_rows(path: Path, column: str) -> list[str]:
    table = _csv_table(path)
    try:
        return _column_of(table, column, path)
    except csv.Error as error:
        raise DataError(f"line {table.line_num} is no CSV: {error}", where=path) from None


def _column_of(table: Reader, column: str, path: Path) -> list[str]:
    header = next(table, [])
    if column not in header:
        raise missing_column(path, column, header)
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


def missing_column(path: Path, column: str, there: Iterable[str]) -> DataError:
    """The error for a column that is not there, naming those that are."""
    return DataError(
        f"there is no column {column!r}, only {', '.join(map(repr, there)) or 'none at all'}",
        where=path,
        mend="name the column that holds the text",
    )
