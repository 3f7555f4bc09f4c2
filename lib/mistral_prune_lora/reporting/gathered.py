"""What the report's pages are made of: tables of the workflow, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results.summary import COLUMNS, Named
from mistral_prune_lora.results.summary_file import AGAIN, read_results, read_table
from mistral_prune_lora.storage.json_file import read_json

_COMPARED = ("experiment", "dataset", "first", "second", "difference", "low", "high")


@dataclass(frozen=True)
class Told:
    """What the workflow knows and no table says.

    Attributes:
        experiments: of each, what it is in words, by what the words are about.
        config: the configuration with all defaults.
        adapters: of each table of strengths, the experiment and variant that it belongs to.
        trainings: of each training's table, the experiment and what the training is called.
        rankings: tables of the ranking of blocks, by experiment.
        made: the names of this configuration's artefacts, models and experiments, as they stand in the names of
            benchmarks.
        of_config: what the names of this configuration's own files end in: nothing, or a dot and its name.
    """

    experiments: Mapping[str, Mapping[str, str]]
    config: Mapping
    adapters: Sequence[tuple[str, str, str]] = ()
    trainings: Sequence[tuple[str, str, str]] = ()
    rankings: Mapping[str, str] = field(default_factory=dict)
    made: Sequence[str] = ()
    of_config: str = ""


@dataclass(frozen=True)
class Gathered:
    """Everything that is drawn and told.

    Attributes:
        told: what no table says.
        summary, comparisons: the tables of these names.
        results: every result's record, by its place in the summary's terms.
        windows: the scores of every result's windows, likewise.
    """

    told: Told
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    results: Mapping[tuple[str, str, str, str], Mapping]
    windows: Mapping[tuple[str, str, str, str], pd.DataFrame]

    @property
    def measured(self) -> list[tuple[str, str]]:
        """(experiment, dataset) in the order of the summary."""
        return list(dict.fromkeys(zip(self.summary.experiment, self.summary.dataset, strict=True)))

    def rows(self, experiment: str, dataset: str) -> pd.DataFrame:
        """The summary's rows of one experiment and dataset."""
        return self.summary[(self.summary.experiment == experiment) & (self.summary.dataset == dataset)]


def gather(summary: str | Path, comparisons: str | Path, results: Sequence[Named], told: Told) -> Gathered:
    """Read what the pages are made of.

    Raises:
        DataError: one of the files cannot be read.
    """
    records, windows = {}, {}
    for named in results:
        key = (named.experiment, named.dataset, named.variant, named.stage)
        records[key] = read_json(named.path, DataError, mend=AGAIN)
        windows[key] = read_table(Path(named.path).with_suffix(".parquet"))
    return Gathered(told, read_results(summary, COLUMNS), read_results(comparisons, _COMPARED), records, windows)
