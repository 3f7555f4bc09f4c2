"""Candidates in the order of the damage that they do, and how far proxies are from that order. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mistral_prune_lora.choosing.candidates import Missing
from mistral_prune_lora.results.statistics import WindowScores, paired_difference, summarise

if TYPE_CHECKING:
    import pandas as pd  # at run time where tables are made: the start of the process needs none

# Of the interval by which a race drops candidates. Wider than the table's, since it is looked at again and again.
RACE_LEVEL = 0.99
PROXIES = ("ppl", "angular_distance", "block_influence")
_FEWEST = 3  # candidates that make a rank correlation worth telling


def survivors(scores: Mapping[Missing, WindowScores], predicted: int) -> list[Missing]:
    """The candidates whose KL is not surely above the best one's, by the paired interval at RACE_LEVEL.

    Args:
        scores: of the same windows.
        predicted: tokens that are predicted in a window.
    """
    kl = {missing: _kl(found) / predicted for missing, found in scores.items()}
    best = min(kl, key=lambda missing: float(kl[missing].mean()))
    above = {missing: paired_difference(kl[best], kl[missing], level=RACE_LEVEL)["low"] for missing in kl}
    return [missing for missing, low in above.items() if low is None or low <= 0]


def ranked(scores: Mapping[Missing, WindowScores], predicted: int) -> pd.DataFrame:
    """Candidates by KL(dense || candidate), the best first.

    Those that a race has dropped come behind those measured on all windows, the last dropped first; they are compared
    with the best on the windows that they have.

    Args:
        scores: of each candidate; those of fewer windows have the first ones.
        predicted: tokens that are predicted in a window.

    Returns:
        One row a candidate: missing (the layers that it runs without), rank, windows, kl_dense, kl_dense_se,
        kl_above_best with its 95 % interval (.._low, .._high), ppl, ppl_se, top1_agreement. In nats a token; standard
        errors and intervals are None for a single window.
    """
    import pandas as pd

    numbers = {m: summarise(found, predicted_per_window=predicted, tokens_per_byte=None) for m, found in scores.items()}
    order = sorted(scores, key=lambda m: (-numbers[m]["windows"], numbers[m]["kl_dense"]))
    best, rows = _kl(scores[order[0]]) / predicted, []
    for rank, missing in enumerate(order, 1):
        told, kl = numbers[missing], _kl(scores[missing]) / predicted
        above = paired_difference(best[: len(kl)], kl)
        rows.append(
            {
                "missing": missing,
                "rank": rank,
                "windows": told["windows"],
                "kl_dense": told["kl_dense"],
                "kl_dense_se": told["kl_dense_se"],
                "kl_above_best": above["difference"],
                "kl_above_best_low": above["low"],
                "kl_above_best_high": above["high"],
                "ppl": told["ppl"],
                "ppl_se": told["ppl_se"],
                "top1_agreement": told["top1_agreement"],
            }
        )
    return pd.DataFrame(rows)


def agreement(table: pd.DataFrame) -> dict[str, dict]:
    """How well each proxy in a table from `ranked` tells what KL tells.

    Returns:
        For each of PROXIES that is a column: spearman (of the order by it and by KL, over the candidates that were
        measured on all windows; None for fewer than three), candidates (how many those are), picks (what it would
        choose), regret (how much the KL of that is above the best, nats a token) with regret_low and regret_high.
    """
    from scipy.stats import spearmanr

    whole = table[table.windows == table.windows.max()]
    told = {}
    for name in (name for name in PROXIES if name in table):
        picked = table.sort_values(name).iloc[0]
        tied = whole[name].nunique() < 2 or whole.kl_dense.nunique() < 2
        rho = None if len(whole) < _FEWEST or tied else float(spearmanr(whole[name], whole.kl_dense).statistic)
        told[name] = {
            "spearman": rho,
            "candidates": len(whole),
            "picks": list(picked.missing),
            "regret": float(picked.kl_above_best),
            "regret_low": number(picked.kl_above_best_low),
            "regret_high": number(picked.kl_above_best_high),
        }
    return told


def number(value: object) -> float | None:
    """A table's number as JSON takes it; None for what is missing."""
    return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else None


def _kl(scores: WindowScores) -> np.ndarray:
    assert scores.kl is not None  # every candidate is compared with the dense model
    return scores.kl
