"""The summary as a table for the terminal. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from mistral_prune_lora.errors import printable, shortened
from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.results.summary_file import VARIANTS, read_results

WIDTH = 100
_NAMES = ("experiment", "dataset", "stage")
_GAP = "  "
_BESIDE = {
    "comparisons{}.csv": "differences between results, with intervals",
    "seeds{}.csv": "means and standard deviations over seeds",
    "baseline{}.csv": "differences to the baseline",
    "plots/perplexity{}.svg": "the figure",
}


def summary_table(summary_csv: str | Path) -> str:
    """The perplexities of a summary.csv, at most WIDTH characters wide.

    A row an experiment, dataset and stage; for each variant, perplexity and standard error, and KL from the dense model
    where it is known. Names that are too long lose their middle.

    Args:
        summary_csv: the file; what lies beside it is named below the table.

    Raises:
        DataError: it is no summary.
    """
    path = Path(summary_csv)
    table = read_results(path, (*_NAMES, "variant", "ppl", "ppl_se", "kl_dense"))
    columns = _columns(table)
    keys = sorted(
        {tuple(row[name] for name in _NAMES) for row in table.to_dict("records")}, key=_order(table.to_dict("records"))
    )
    results = {(*(row[name] for name in _NAMES), row["variant"]): row for row in table.to_dict("records")}
    cells = [[*map(printable, key), *(_cell(results.get((*key, v)), what) for v, what in columns)] for key in keys]
    heads = [*_NAMES, *(f"{variant} {'KL' if what == 'kl_dense' else 'PPL'}" for variant, what in columns)]
    lines = list(_aligned([heads, *_without_repeats(cells)]))
    doubtful = sum(bool(row.get("warnings")) for row in table.to_dict("records"))
    if doubtful:
        lines += ["", f"{doubtful} of {len(table)} results are doubtful: see the column warnings"]
    lines += ["", f"{path}  every number"]
    # Of another configuration than config.yaml, all bear its name: summary.mistral-7b.csv.
    beside = {path.parent / name.format(path.stem.removeprefix("summary")): what for name, what in _BESIDE.items()}
    lines += [f"{file}  {what}" for file, what in beside.items() if file.is_file()]
    return "\n".join(lines) + "\n"


def _columns(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(variant, what is shown of it); KL only where there is one."""
    found = []
    for variant in VARIANTS:
        rows = table[table.variant == variant]
        if len(rows):
            found.append((variant, "ppl"))
        if variant != "dense" and rows.kl_dense.notna().any():
            found.append((variant, "kl_dense"))
    return found


def _order(rows: Sequence[Mapping]):
    """A sort key: experiments and datasets as they come, then the stages."""
    places = {(row["experiment"], row["dataset"]): place for place, row in reversed(list(enumerate(rows)))}
    return lambda key: (places[key[:2]], STAGES.index(key[2]) if key[2] in STAGES else len(STAGES))


def _cell(row: Mapping | None, what: str) -> str:
    if row is None or not math.isfinite(row[what]):
        return ""
    if what == "kl_dense":
        return f"{row[what]:.3f}"
    error = f" ± {_short(row['ppl_se'], 0)}" if math.isfinite(row["ppl_se"]) else ""
    return _short(row[what], 1) + error


def _short(value: float, digits: int) -> str:
    """A number in at most seven characters, of a large one the first digits alone."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 100_000 else f"{value:.{digits}e}"


def _without_repeats(cells: Sequence[list[str]]) -> Iterator[list[str]]:
    """Rows that leave out the experiment and the dataset where they are those of the row above."""
    above: list[str] = ["", ""]
    for row in cells:
        repeated = row[:2] == above
        above = row[:2]
        yield [*(("", "") if repeated else above), *row[2:]]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows as lines: names to the left and shortened to fit, numbers to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    names = len(_NAMES) - 1
    left = WIDTH - sum(widths[names:]) - len(_GAP) * (len(widths) - 1)
    # Of the two, the dataset's name gives way first, and neither to less than its heading.
    widths[1] = max(len(_NAMES[1]), min(widths[1], left - widths[0]))
    widths[0] = max(len(_NAMES[0]), min(widths[0], left - widths[1]))
    for row in rows:
        told = [shortened(name, width).ljust(width) for name, width in zip(row[:names], widths, strict=False)]
        told.append(row[names].ljust(widths[names]))
        told += [cell.rjust(width) for cell, width in zip(row[names + 1 :], widths[names + 1 :], strict=True)]
        yield _GAP.join(told).rstrip()
