"""The choice: which layers to drop by the damage that A suffers, and which of them B restores by what AB lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_prune_lora.choosing.candidates import Missing, blocks, one_more, splits
from mistral_prune_lora.choosing.measure import DENSE, Measured, Measurement
from mistral_prune_lora.choosing.ranking import agreement, ranked
from mistral_prune_lora.choosing.settings import ChoiceSettings
from mistral_prune_lora.layout.partition import spans
from mistral_prune_lora.results.statistics import summarise

if TYPE_CHECKING:
    import pandas as pd  # at run time where tables are made: the start of the process needs none

# Of choice.csv, in this order.
COLUMNS = (
    "kind",
    "rank",
    "chosen",
    "dropped",
    "B",
    "C",
    "windows",
    "kl_dense",
    "kl_dense_se",
    "kl_above_best",
    "kl_above_best_low",
    "kl_above_best_high",
    "ppl",
    "ppl_se",
    "top1_agreement",
    "ppl_rank",
    "angular_distance",
    "angular_rank",
    "block_influence",
    "influence_rank",
)

_RANKS = {"ppl": "ppl_rank", "angular_distance": "angular_rank", "block_influence": "influence_rank"}


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        b, c: the layers of the bundles.
        table: every candidate, with the columns COLUMNS: the blocks (or the steps of a greedy choice), then the splits.
        proxies: what `ranking.agreement` says of the blocks; empty for a greedy choice.
        dense: the numbers of the dense model, as `statistics.summarise` gives them.
        passes: how many times a layer was run, in all, an average over the windows.
    """

    b: Missing
    c: Missing
    table: pd.DataFrame
    proxies: dict[str, dict]
    dense: dict
    passes: float

    @property
    def dropped(self) -> Missing:
        """The layers of both."""
        return tuple(sorted(self.b + self.c))


def choose(measurement: Measurement, settings: ChoiceSettings) -> Choice:
    """Measure and choose.

    Raises:
        LayoutError: nothing of that size can be chosen; too many splits. Before anything is measured.
        PipelineError: as `Measurement.measure`.
    """
    import pandas as pd

    settings.check(measurement.num_layers)
    if settings.method == "greedy":
        tables, measured = _greedy(measurement, settings)
        proxies: dict[str, dict] = {}
    else:
        table, measured = _blocks(measurement, settings)
        tables, proxies = [table], agreement(table)
    dropped = tables[-1].missing[0]
    b, c, passes = dropped[: len(dropped) // 2], dropped[len(dropped) // 2 :], measured.passes
    if settings.sizes():
        parted, run = _splits(measurement, dropped, settings)
        tables.append(parted)
        (b, c), passes = (parted.b[0], parted.c[0]), passes + run
    dense = summarise(measured.scores[DENSE], predicted_per_window=measurement.predicted, tokens_per_byte=None)
    return Choice(b, c, pd.concat([_shown(table) for table in tables]), proxies, dense, passes)


def _blocks(measurement: Measurement, settings: ChoiceSettings) -> tuple[pd.DataFrame, Measured]:
    candidates = blocks(measurement.num_layers, settings.drop, keep_last_layer=settings.keep_last_layer)
    measured = measurement.measure(candidates, words=f"blocks of {settings.drop}", block=settings.drop)
    table = _ranked(measurement, measured)
    proxies = measured.proxies
    assert proxies is not None  # asked for
    table["angular_distance"] = [proxies.angular_distance(missing[0]) for missing in table.missing]
    table["block_influence"] = [proxies.block_influence(missing) for missing in table.missing]
    for name, column in _RANKS.items():
        table[column] = table[name].rank(method="first").astype(int)
    table.insert(0, "kind", "block")
    return table, measured


def _greedy(measurement: Measurement, settings: ChoiceSettings) -> tuple[list[pd.DataFrame], Measured]:
    """One layer after the other, after SLEB (Song et al. 2024, arXiv 2402.09025, algorithm 1), by KL.

    Returns:
        A table for each step, and the last step's measurement with the layer passes of all of them.
    """
    dropped: Missing = ()
    tables, passes = [], 0.0
    for step in range(1, settings.drop + 1):
        candidates = one_more(measurement.num_layers, dropped, keep_last_layer=settings.keep_last_layer)
        measured = measurement.measure(candidates, words=f"layer {step} of {settings.drop}")
        passes += measured.passes
        table = _ranked(measurement, measured)
        table.insert(0, "kind", f"greedy {step}")
        tables.append(table)
        dropped = table.missing[0]
        print(f"without layers {spans(dropped)}: KL {table.kl_dense[0]:.4f}, PPL {table.ppl[0]:.2f}")
    return tables, Measured(measured.scores, None, passes)


def _splits(measurement: Measurement, dropped: Missing, settings: ChoiceSettings) -> tuple[pd.DataFrame, float]:
    """B and C of the dropped layers, ranked by the KL of stage AB among those of one size; and the layer passes.

    A larger B is nearer to the dense model whatever it holds, so sizes are not ranked against each other.
    """
    import pandas as pd

    ways = splits(dropped, settings.sizes(), every=settings.splits == "all")
    by_c = {c: b for b, c in ways}
    measured = measurement.measure(list(by_c), words="stage AB", race=False)
    tables = []
    for size in dict.fromkeys(settings.sizes()):
        scores = {c: measured.scores[c] for c, b in by_c.items() if len(b) == size}
        table = ranked(scores, measurement.predicted)
        table.insert(0, "kind", f"split {size}+{len(dropped) - size}")
        table["chosen"] = (table["rank"] == 1) & (size == settings.sizes()[0])
        table["b"], table["c"] = [by_c[c] for c in table.missing], list(table.missing)
        tables.append(table)
    return pd.concat(tables, ignore_index=True), measured.passes


def _ranked(measurement: Measurement, measured: Measured) -> pd.DataFrame:
    scores = {missing: scores for missing, scores in measured.scores.items() if missing != DENSE}
    table = ranked(scores, measurement.predicted)
    table["chosen"] = table["rank"] == 1
    return table


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the columns of choice.csv; what it does not have is empty."""
    table = table.copy()
    parted = "b" in table
    table["dropped"] = (
        [_words(b + c) for b, c in zip(table.b, table.c, strict=True)] if parted else [*map(_words, table.missing)]
    )
    for part in "BC":
        table[part] = [_words(layers) for layers in table[part.lower()]] if parted else None
    return table.reindex(columns=list(COLUMNS))


def _words(layers: Sequence[int]) -> str:
    return " ".join(map(str, sorted(layers)))
