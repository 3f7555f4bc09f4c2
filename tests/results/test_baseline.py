"""Differences to a baseline: paired window by window, or left out with a reason."""

import numpy as np
import pandas as pd
import pytest

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results.baseline import COLUMNS, baseline_differences
from mistral_prune_lora.results.statistics import WindowScores, paired_difference

TOKENS = 10
FIRST, SECOND = np.array([30.0, 33.0, 31.0]), np.array([28.0, 32.0, 30.5])


class Table:
    """Rows of a summary and the windows behind them."""

    def __init__(self, folder):
        self.folder, self.rows, self.windows = folder, [], {}

    def add(self, experiment, nll, *, variant="merged", stage="A", ids="1" * 64, weights="a", dataset="text"):
        nll = np.array(nll)
        key = (experiment, dataset, variant, stage)
        path = self.folder / ("_".join(key) + ".parquet")
        WindowScores(nll, np.zeros(len(nll))).save(path, TOKENS)
        names = dict(zip(("experiment", "dataset", "variant", "stage"), key, strict=True))
        self.rows.append(
            names | {"ids_sha256": ids, "weights_sha256": weights, "mean_nll": nll.sum() / TOKENS / len(nll)}
        )
        self.windows[key] = path

    def compared(self, **baselines):
        return baseline_differences(pd.DataFrame(self.rows), self.windows, baselines)


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path)


def test_each_result_is_paired_with_the_same_one_of_the_baseline(table):
    for name, nll in (("base", FIRST), ("new", SECOND)):
        table.add(name, nll, weights=name)
        table.add(name, nll + 1, stage="AB", weights=name)
    table.add("other", SECOND)
    found, left_out = table.compared(new="base")
    assert found.columns.tolist() == list(COLUMNS) and left_out == []
    assert found[["experiment", "baseline", "dataset", "first", "second"]].values.tolist() == [
        ["new", "base", "text", "merged.A", "merged.A"], ["new", "base", "text", "merged.AB", "merged.AB"],
    ]  # fmt: skip
    wanted = paired_difference(FIRST / TOKENS, SECOND / TOKENS)
    assert found.iloc[0][list(wanted)].to_dict() == pytest.approx(wanted)
    assert wanted["difference"] < 0  # the second is the better one


def test_what_cannot_be_compared_is_left_out_and_said(table):
    table.add("base", FIRST)
    table.add("new", SECOND, ids="2" * 64)
    table.add("new", SECOND, stage="FULL")
    found, left_out = table.compared(new="base")
    assert found.empty and found.columns.tolist() == list(COLUMNS)
    assert left_out == [
        "new, text, merged.A: base was measured on other token ids",
        "new, text, merged.FULL: base has no such result",
    ]


def test_one_model_in_both_experiments_is_no_comparison(table):
    table.add("base", FIRST, variant="dense", stage="FULL")
    table.add("new", FIRST, variant="dense", stage="FULL")
    table.add("base", FIRST, weights=None)
    table.add("new", FIRST, weights=None)  # without digests nobody knows
    found, left_out = table.compared(new="base")
    assert found["first"].tolist() == ["merged.A"] and found.difference.tolist() == [0.0] and left_out == []


def spoiled(path):
    path.write_bytes(b"no parquet")


def other_columns(path):
    pd.DataFrame({"nll": [1.0]}).to_parquet(path)


def not_a_number(path):
    WindowScores(np.array([np.nan, 1.0, 1.0]), np.zeros(3)).save(path, TOKENS)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoiled, "cannot be read as the windows of a result"),
        (other_columns, "cannot be read as the windows of a result"),
        (not_a_number, "is NaN or infinity"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: WindowScores(FIRST[:2], FIRST[:2]).save(path, TOKENS), "cannot be compared in pairs"),
    ],
)
def test_windows_that_cannot_be_used_are_refused(table, spoil, told):
    table.add("base", FIRST, weights="b")
    table.add("new", SECOND)
    spoil(table.windows["new", "text", "merged", "A"])
    with pytest.raises(DataError, match=told):
        table.compared(new="base")
