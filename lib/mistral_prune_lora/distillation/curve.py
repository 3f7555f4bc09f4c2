"""The curve of a training: a row an update and a row a look at held-out windows, written as it goes, and to loggers."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from mistral_prune_lora.errors import PipelineError

COLUMNS = ("step", "loss", "kl", "ce", "learning_rate", "grad_norm", "tokens", "skipped")
HELD_OUT_COLUMNS = ("step", "ppl", "mean_nll", "kl", "top1_agreement")
_WHOLE = {"step", "tokens", "skipped"}


class Logger(Protocol):
    """What else is told of a training."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers of an update."""

    def close(self) -> None:
        """The training has ended."""


class Table:
    """Rows of numbers that are in a file as soon as they are known, as CSV."""

    def __init__(self, path: Path | None, columns: Sequence[str], rows: torch.Tensor | None = None) -> None:
        """Begin the file.

        Args:
            path: the file; None keeps the rows in memory alone.
            columns: their names.
            rows: those of a run that is gone on with, float64, shape (rows, columns).
        """
        self.path, self.columns = path, tuple(columns)
        self.rows: list[tuple[float, ...]] = [] if rows is None else [tuple(row) for row in rows.tolist()]
        if path:
            path.write_text(self.text(), encoding="utf-8")

    def add(self, row: Sequence[float]) -> None:
        """Append a row. A disk that is full ends no training: the file then lacks what the result will have."""
        self.rows.append(tuple(row))
        if self.path:
            with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(self._shown(row)))

    def text(self) -> str:
        """The whole table as CSV. What is not known, such as a divergence without a teacher, is an empty cell."""
        return "".join(map(_line, [self.columns, *map(self._shown, self.rows)]))

    def tensor(self) -> torch.Tensor:
        """The rows as float64, shape (rows, columns)."""
        return torch.tensor(self.rows, dtype=torch.float64).view(-1, len(self.columns))

    def _shown(self, row: Sequence[float]) -> list[object]:
        known = zip(self.columns, row, strict=True)
        return ["" if value != value else int(value) if name in _WHOLE else float(value) for name, value in known]


def _line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def open_loggers(names: Sequence[str], output_dir: Path, about: Mapping[str, object]) -> list[Logger]:
    """The loggers that were asked for.

    Args:
        names: "tensorboard", "trackio".
        output_dir: the adapter's directory; TensorBoard's files go to `NAME.tensorboard` beside it.
        about: what is trained, for trackio.

    Raises:
        PipelineError: the package of one is not installed.
    """
    made: dict[str, Any] = {"tensorboard": _TensorBoard, "trackio": _Trackio}
    return [made[name](output_dir, about) for name in names]


def check_loggers(names: Sequence[str]) -> None:
    """Raise a PipelineError if the package of a logger is not installed."""
    for name in names:
        _package({"tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}[name], name)


class _TensorBoard:
    def __init__(self, output_dir: Path, about: Mapping[str, object]) -> None:
        writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(output_dir.with_name(f"{output_dir.name}.tensorboard")))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, output_dir: Path, about: Mapping[str, object]) -> None:
        self._trackio = _package("trackio", "trackio")
        self._trackio.init(project="mistral-prune-lora", name=output_dir.name, config=dict(about))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PipelineError(
            f"the package {name} is not installed", where="loggers", mend=f"pip install {name}, or leave it out"
        ) from None
