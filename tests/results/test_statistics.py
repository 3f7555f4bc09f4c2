"""Standard errors, quantiles and paired differences against direct formulas and published tables."""

import math

import numpy as np
import pandas as pd
import pytest

from mistral_prune_lora.errors import DataError, NumberError
from mistral_prune_lora.results.statistics import (
    WindowScores,
    compare_stages,
    paired_difference,
    standard_error,
    summarise,
)


# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: critical values of Student's t distribution.
@pytest.mark.parametrize(
    ("freedom", "at_975", "at_95", "at_999"),
    [
        (1, 12.706, 6.314, 318.313),
        (2, 4.303, 2.920, 22.327),
        (3, 3.182, 2.353, 10.215),
        (4, 2.776, 2.132, 7.173),
        (5, 2.571, 2.015, 5.893),
        (10, 2.228, 1.812, 4.144),
        (29, 2.045, 1.699, 3.396),
        (60, 2.000, 1.671, 3.232),
        (100, 1.984, 1.660, 3.174),
    ],
)
def test_intervals_are_those_of_the_tables(freedom, at_975, at_95, at_999):
    # The tables are rounded to three decimals, and the last column of one degree is known to be off by a few.
    second = np.arange(freedom + 1) / freedom
    for level, quantile in ((0.95, at_975), (0.9, at_95), (0.998, at_999)):
        found = paired_difference(np.zeros(freedom + 1), second, level=level)
        width = (found["high"] - found["low"]) / (2 * standard_error(second))
        assert width == pytest.approx(quantile, abs=6e-4, rel=1.5e-4)


def test_a_summary_is_the_direct_formulas():
    rng = np.random.default_rng(0)
    nll, correct, kl, agree = rng.normal(60, 5, 9), rng.integers(0, 20, 9), rng.random(9), rng.integers(0, 20, 9)
    scores = WindowScores(nll, correct.astype(float), kl, agree.astype(float))
    found = summarise(scores, predicted_per_window=20, tokens_per_byte=0.25)
    mean = nll.sum() / 180
    error = np.std(nll / 20, ddof=1) / 3
    assert found == {
        "ppl": pytest.approx(math.exp(mean)),
        "ppl_se": pytest.approx(math.exp(mean) * error),
        "mean_nll": pytest.approx(mean),
        "mean_nll_se": pytest.approx(error),
        "bits_per_byte": pytest.approx(mean / math.log(2) / 4),
        "tokens": 180,
        "windows": 9,
        "top1_accuracy": pytest.approx(correct.sum() / 180),
        "kl_dense": pytest.approx(kl.sum() / 180),
        "kl_dense_se": pytest.approx(np.std(kl / 20, ddof=1) / 3),
        "top1_agreement": pytest.approx(agree.sum() / 180),
    }


def test_one_window_has_no_standard_error():
    found = summarise(WindowScores(np.array([7e3]), np.array([0.0])), predicted_per_window=10, tokens_per_byte=1)
    assert found["ppl"] == math.exp(700) and found["mean_nll"] == 700
    assert found["ppl_se"] is None and found["mean_nll_se"] is None and "kl_dense" not in found
    assert standard_error(np.array([1.0])) is None and standard_error(np.array([1.0, 3.0])) == 1.0


@pytest.mark.parametrize(
    ("nll", "told"),
    [
        ([10.0, math.nan, 10.0], "a score of window 1 is NaN or infinity"),
        ([math.inf, 10.0, 10.0], "a score of window 0 is NaN or infinity"),
        ([7.2e3, 7.2e3, 7.2e3], r"exp\(720\), the perplexity, is beyond the largest number"),
        ([0.0, 0.0, 3 * 7.09e3], "ppl_se is NaN or infinity, at a mean NLL of 709 nats"),
    ],
)
def test_a_perplexity_that_is_no_number_is_refused(nll, told):
    scores = WindowScores(np.array(nll), np.zeros(3))
    with pytest.raises(NumberError, match=told):
        summarise(scores, predicted_per_window=10, tokens_per_byte=0.25)


def test_without_text_there_are_no_bits_per_byte():
    scores = WindowScores(np.array([10.0, 11.0]), np.zeros(2))
    assert summarise(scores, predicted_per_window=10, tokens_per_byte=None)["bits_per_byte"] is None


def test_a_ratio_of_perplexities_beyond_the_largest_number_is_refused():
    """It was cut off at exp(700) before, which is a number, and a wrong one."""
    assert paired_difference(np.zeros(2), np.full(2, 705.0))["ppl_ratio"] == math.exp(705)
    with pytest.raises(NumberError, match="beyond the largest number"):
        paired_difference(np.zeros(2), np.full(2, 720.0))


def test_a_paired_difference_is_students_interval():
    first, second = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.5, 2.25, 3.75, 4.5])
    found = paired_difference(first, second)
    half = 3.182446 * np.std(second - first, ddof=1) / 2
    assert found["difference"] == 0.5 and found["ppl_ratio"] == pytest.approx(math.exp(0.5))
    assert (found["low"], found["high"]) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    wider = paired_difference(first, second, level=0.99)
    assert wider["low"] < found["low"] and wider["high"] > found["high"]
    assert paired_difference(first[:1], second[:1])["low"] is None
    with pytest.raises(DataError, match="4 and 3 windows"):
        paired_difference(first, second[:3])


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [paired_difference(rng.normal(0, 1, 8), rng.normal(0.3, 1, 8)) for _ in range(2000)]
    assert 0.935 < np.mean([f["low"] <= 0.3 <= f["high"] for f in found]) < 0.965


def test_every_pair_of_stages_is_compared():
    nll = {"A": np.array([3.0, 4.0]), "AB": np.array([2.0, 3.5]), "FULL": np.array([1.0, 1.0])}
    table = compare_stages(nll)
    assert list(zip(table["first"], table["second"], strict=True)) == [("A", "AB"), ("A", "FULL"), ("AB", "FULL")]
    assert table["difference"].tolist() == [-0.75, -2.5, -1.75]
    assert compare_stages({"A": nll["A"]}).empty


def test_scores_are_saved_a_row_a_window(tmp_path):
    parts = [WindowScores(np.array([1.0, 2.0]), np.array([0.0, 1.0])), WindowScores(np.array([3.0]), np.array([2.0]))]
    WindowScores.concatenate(parts).save(tmp_path / "scores.parquet", 7)
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table.to_dict("list") == {
        "window": [0, 1, 2],
        "tokens": [7, 7, 7],
        "nll": [1.0, 2.0, 3.0],
        "correct": [0.0, 1.0, 2.0],
    }
