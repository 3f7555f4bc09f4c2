"""Tables of a page: sortable, searchable, numbers short to read and whole to sort by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pandas as pd


def searchable(table: pd.DataFrame, name: str) -> str:
    """A table as HTML, with a field to search it by.

    Args:
        table: numbers are shown with five significant digits, and sorted and told on hovering in full.
        name: an id of its own in the page.
    """
    numbers = {column for column in table.columns if pd.api.types.is_numeric_dtype(table[column].dtype)}
    numbers -= {column for column in numbers if pd.api.types.is_bool_dtype(table[column].dtype)}
    heads = "".join(
        f'<th scope="col"{_class(column in numbers)}><button type="button">{escape(column)}</button></th>'
        for column in table.columns
    )
    rows = "".join(
        "<tr>" + "".join(_cell(value, column in numbers) for column, value in row.items()) + "</tr>"
        for row in table.to_dict("records")
    )
    label = escape(f"search the table of {len(table)} rows")
    return (
        f'<input type="search" data-table="{escape(name)}" placeholder="search" aria-label="{label}">'
        f'<div class="wide"><table id="{escape(name)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def plain(heads: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]], words: int) -> str:
    """A small table of cells that are made already, the first columns words and the others numbers.

    Args:
        heads: the headings.
        rows: cells as text, which is escaped; of two texts, the second stands small below the first.
        words: how many columns are words.
    """
    head = "".join(f'<th scope="col"{_class(n >= words)}>{escape(cell)}</th>' for n, cell in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{_class(n >= words)}>{_told(cell)}</td>" for n, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _told(cell: str | tuple[str, str]) -> str:
    return escape(cell) if isinstance(cell, str) else f"{escape(cell[0])}<small>{escape(cell[1])}</small>"


def unfolded(title: str, body: str) -> str:
    """What is read only by those who ask for it."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _cell(value: object, number: bool) -> str:
    if not number:
        text = "" if value is None or value != value else str(value)
        if len(text) == 64 and set(text) <= set("0123456789abcdef"):  # a sha256: its start tells it from others
            return f'<td title="{text}">{text[:12]}</td>'
        long = ' class="text"' if len(text) > 40 else ""
        return f"<td{long}>{escape(text)}</td>"
    told = float(value)  # type: ignore[arg-type]
    if not math.isfinite(told):
        return '<td class="number" data-value=""></td>'
    return f'<td class="number" data-value="{told!r}" title="{told!r}">{short(told)}</td>'


def short(value: float) -> str:
    """A number with five significant digits; whole numbers whole."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.5g}"
