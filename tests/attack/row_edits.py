"""What can be done to files of rows: lines, columns, packing; of parquet, tables that a writer of it made soundly."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from attack.byte_edits import BYTE_EDITS

_GZIP_LEVEL = 1
LINES = {
    "null": b'{"text": null}',
    "a number": b'{"text": 5}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "another column": b'{"other": "a"}',
    "a list": b"[]",
    "an open quote": b'"',
    "commas": b",,,,",
    "half an object": b'{"text": "a"',
    "NaN": b"NaN",
    "a column twice": b'{"text": "a", "text": "b"}',
    "nested lists": b'{"text": ' + b"[" * 50_000,
    "a long line": b'{"text": "' + b"ab " * 1_000_000 + b'"}',
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "nothing": b"",
}
# Sound tables by a name each; made once, since pyarrow starts threads.
TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    "numbers": lambda: pd.DataFrame({"text": range(60)}),
    "nothing but null": lambda: pd.DataFrame({"text": [None] * 60}),
    "lists": lambda: pd.DataFrame({"text": [["a", "b"]] * 60}),
    "bytes": lambda: pd.DataFrame({"text": [b"\xff\xfe"] * 60}),
    "another column": lambda: pd.DataFrame({"content": ["a"] * 60}),
    "no rows": lambda: pd.DataFrame({"text": pd.Series([], dtype=str)}),
    "categories": lambda: pd.DataFrame({"text": pd.Categorical(["many words of one kind"] * 200)}),
    "dates": lambda: pd.DataFrame({"text": pd.date_range("2000", periods=60)}),
    "some null": lambda: pd.DataFrame({"text": ["a row of words", None] * 60}),
    "a small file of much text": lambda: pd.DataFrame({"text": ["a" * 1_000_000] * 1200}),
}
_made: dict[str, bytes] = {}


def make_tables(folder: Path) -> None:
    """Write the sound tables as parquet."""
    folder.mkdir()
    for name, table in TABLES.items():
        table().to_parquet(folder / name)


def load_tables(folder: Path) -> None:
    """Read what `make_tables` wrote, so that edits can put it in place."""
    _made.update((name, (folder / name).read_bytes()) for name in TABLES)


def _lines(do: Callable[..., list[bytes]]) -> Callable[..., bytes]:
    def edit(data: bytes, share: float, *arguments: object) -> bytes:
        lines = data.split(b"\n")
        at = min(int(share * len(lines)), len(lines) - 1)
        return b"\n".join(do(lines, at, *arguments))

    return edit


def _unpacked(change: Callable[..., bytes]) -> Callable[..., bytes]:
    """An edit of what a gzip file holds."""

    def edit(data: bytes, *arguments: object) -> bytes:
        try:
            content = gzip.decompress(data)
        except (OSError, EOFError, ValueError):
            return data
        return gzip.compress(change(content, *arguments), _GZIP_LEVEL, mtime=0)

    return edit


def _bomb(_: bytes, megabytes: int) -> bytes:
    return gzip.compress(b'{"text": "' + b"a" * (megabytes << 20) + b'"}\n', _GZIP_LEVEL, mtime=0)


_PLAIN: dict[str, Callable[..., bytes]] = {
    "line is": _lines(lambda lines, at, name: [*lines[:at], LINES[name], *lines[at + 1 :]]),
    "line left out": _lines(lambda lines, at: [*lines[:at], *lines[at + 1 :]]),
    "lines turned round": _lines(lambda lines, at: [*lines[at:], *lines[:at]]),
    "column renamed": lambda data: data.replace(b"text", b"txet"),
    "line ends": lambda data, end: data.replace(b"\n", end.encode()),
}
ROW_EDITS: dict[str, Callable[..., bytes]] = {
    **_PLAIN,
    **{f"unpacked: {name}": _unpacked(do) for name, do in {**_PLAIN, **BYTE_EDITS}.items()},
    "not packed": lambda data: gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data,
    "a bomb": _bomb,
    "a sound table of": lambda data, name: _made[name],
}
