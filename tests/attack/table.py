"""The table of a campaign: a row for each kind of attack, a column for each thing that can come of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from attack.classify import RIGHT, Column

_HEAD = ["what was attacked", "tried", *(column.value for column in Column)]
_START, _END = "<!-- the table -->", "<!-- the end of the table -->"


def table(counts: Mapping[str, Counter]) -> str:
    """The table in markdown, its sum last; a fault stands in bold.

    Args:
        counts: by row, how often each column was met.
    """
    total = sum(counts.values(), Counter())
    rows = [_row(name, counts[name]) for name in counts] + [_row("**all**", total)]
    return "\n".join(["| " + " | ".join(_HEAD) + " |", "|---" + "|---:" * (len(_HEAD) - 1) + "|", *rows])


def _row(name: str, count: Counter) -> str:
    cells = [str(count[c]) if c in RIGHT or not count[c] else f"**{count[c]}**" for c in Column]
    return "| " + " | ".join([name, str(sum(count.values())), *cells]) + " |"


def write_table(path: Path, told: Iterable[str]) -> None:
    """Put a table and what is said of it into a document, between the two marks for it."""
    text = path.read_text(encoding="utf-8")
    body = f"{_START}\n\n" + "\n\n".join(told) + f"\n\n{_END}"
    path.write_text(re.sub(f"{_START}.*{_END}", lambda _: body, text, flags=re.DOTALL), encoding="utf-8")
