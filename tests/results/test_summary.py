"""The summary over results: rows, order, comparisons, and what is not put side by side."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results.statistics import WindowScores, summarise
from mistral_prune_lora.results.summary import COLUMNS, Named, write_summary


def result(folder, variant, stage, nll, *, experiment="one", dataset="text", ids="1" * 64):
    """A result as the evaluation writes it: two windows of ten predicted tokens."""
    path = folder / experiment / "ppl" / dataset / f"{variant}.{stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = WindowScores(np.array(nll), np.array([3.0, 4.0]))
    record = {
        "stage": stage, "label": f"x[{stage}]",
        "active_layers": 4, "parameters": 10, **summarise(scores, predicted_per_window=10, tokens_per_byte=0.25),
        "seqlen": 11, "dtype": "fp32", "ids_sha256": ids, "text": {"dataset": dataset},
    }  # fmt: skip
    path.write_text(json.dumps(record))
    scores.save(path.with_suffix(".parquet"), 10)
    return path


def named(path):
    """A result under the names that its place tells."""
    variant, stage = path.stem.split(".")
    return Named(path.parents[2].name, path.parent.name, variant, stage, path)


def summarised(folder, paths):
    write_summary([named(path) for path in paths], folder / "summary.csv", folder / "comparisons.csv")
    return pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "comparisons.csv")


def test_rows_stand_in_one_order_whatever_order_they_come_in(tmp_path):
    paths = [
        result(tmp_path, "merged", "FULL", [20.0, 22.0]),
        result(tmp_path, "merged", "A", [30.0, 33.0]),
        result(tmp_path, "dense", "FULL", [19.0, 21.0]),
        result(tmp_path, "pruned", "AB", [40.0, 44.0]),
    ]
    table, comparisons = summarised(tmp_path, paths)
    assert table.columns.tolist() == list(COLUMNS)
    assert (table.variant + "." + table.stage).tolist() == ["dense.FULL", "pruned.AB", "merged.A", "merged.FULL"]
    assert table.ppl[0] == pytest.approx(math.exp(2.0)) and table.tokens.tolist() == [20] * 4
    assert table.kl_dense.isna().all()
    assert len(comparisons) == 6
    pair = comparisons[(comparisons["first"] == "merged.A") & (comparisons.second == "merged.FULL")].iloc[0]
    # Windows differ by 1.0 and 1.1 nats a token: mean 1.05, t(0.975, 1) = 12.706, standard error 0.05.
    assert pair.difference == pytest.approx(-1.05) and pair.low == pytest.approx(-1.05 - 12.7062 * 0.05, abs=1e-4)
    assert pair.experiment == "one" and pair.dataset == "text"


def test_experiments_and_datasets_are_compared_within_themselves_only(tmp_path):
    paths = [
        result(tmp_path, "pruned", "A", [30.0, 33.0]),
        result(tmp_path, "pruned", "A", [31.0, 33.0], experiment="two", ids="2" * 64),
        result(tmp_path, "pruned", "A", [32.0, 33.0], dataset="other", ids="3" * 64),
    ]
    table, comparisons = summarised(tmp_path, paths)
    assert list(zip(table.experiment, table.dataset, strict=True)) == [
        ("one", "text"), ("two", "text"), ("one", "other"),
    ]  # fmt: skip
    assert comparisons.empty


def test_results_on_different_token_ids_are_refused(tmp_path):
    paths = [
        result(tmp_path, "pruned", "A", [30.0, 33.0]),
        result(tmp_path, "merged", "A", [30.0, 33.0], ids="2" * 64),
    ]
    with pytest.raises(DataError, match=r"different token ids.*pruned\.A: 111.*merged\.A: 222"):
        summarised(tmp_path, paths)
    assert not (tmp_path / "summary.csv").exists()


def test_warnings_stand_in_the_table(tmp_path):
    path = result(tmp_path, "pruned", "A", [30.0, 33.0])
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "warnings": ["windows are long", "another tokenizer, really"]}))
    table, _ = summarised(tmp_path, [path, result(tmp_path, "merged", "A", [30.0, 33.0])])
    assert table.warnings[0] == "windows are long; another tokenizer, really" and table.warnings.isna().tolist()[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ppl": math.nan}, "NaN is no number"),
        ({"mean_nll_se": math.inf}, "Infinity is no number"),
        ({"mean_nll": 3.16}, r"has the mean NLL 3\.16, and its windows have 3\.15"),
        ({"ppl": 23.5}, r"has the PPL 23\.5, and its windows have 23\.3"),
        ({"windows": 3}, "speaks of 3 windows of 11 tokens"),
        ({"seqlen": 12}, "speaks of 2 windows of 12 tokens"),
        ({"stage": ["A"]}, r"is of stage \['A'\]"),
        ({"stage": "AB"}, "is of stage AB, not A"),
        ({"mean_nll": "3.15"}, "cannot be read as a result"),
        ({"warnings": 7}, "cannot be read as a result"),
    ],
)
def test_a_record_that_its_windows_contradict_is_refused(tmp_path, changes, told):
    path = result(tmp_path, "pruned", "A", [30.0, 33.0])
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match=told):
        summarised(tmp_path, [path])
    assert not (tmp_path / "summary.csv").exists()


@pytest.mark.parametrize("changed", [math.nan, math.inf, 31.0])
def test_windows_that_are_none_or_others_are_refused(tmp_path, changed):
    path = result(tmp_path, "pruned", "A", [30.0, 33.0])
    WindowScores(np.array([30.0, changed]), np.array([3.0, 4.0])).save(path.with_suffix(".parquet"), 10)
    told = "its windows have 3.05" if changed == 31 else "the NLL of a window is NaN or infinity"
    with pytest.raises(DataError, match=told):
        summarised(tmp_path, [path])


@pytest.mark.parametrize("content", ["[]", "null", "3", "[" * 100_000, '{"variant": {}}'], ids=lambda c: c[:9])
def test_a_result_of_another_shape_is_one_line(tmp_path, content):
    path = result(tmp_path, "pruned", "A", [30.0, 33.0])
    path.write_text(content)
    with pytest.raises(DataError, match=r"pruned\.A\.json"):
        summarised(tmp_path, [path])


def test_a_result_that_cannot_be_read_is_named(tmp_path):
    path = result(tmp_path, "pruned", "A", [30.0, 33.0])
    path.with_suffix(".parquet").unlink()
    with pytest.raises(DataError, match=r"pruned\.A\.parquet"):
        summarised(tmp_path, [path])
    result(tmp_path, "pruned", "A", [30.0, 33.0]).write_text("{")
    with pytest.raises(DataError, match=r"pruned\.A\.json"):
        summarised(tmp_path, [path])


def test_what_the_merges_left_out_is_counted_at_every_stage_that_has_the_part(tmp_path):
    paths = [result(tmp_path, "pruned", "A", [30.0, 33.0])]
    paths += [result(tmp_path, "merged", stage, [30.0, 33.0]) for stage in ("A", "AB", "FULL")]
    merges = {}
    for part, left_out in {"A": [[], ["x"]], "B": [["y", "z"]], "C": [["u", "v", "w"]]}.items():
        merges[part] = tmp_path / f"{part}.json"
        merges[part].write_text(json.dumps({"adapters": [{"out_of_scope": names} for names in left_out]}))
    results, told = [named(path) for path in paths], {("one", part): path for part, path in merges.items()}
    write_summary(results, tmp_path / "summary.csv", tmp_path / "comparisons.csv", told)
    table = pd.read_csv(tmp_path / "summary.csv").set_index(["variant", "stage"])["adapter_tensors_out_of_scope"]
    assert table["merged"].to_dict() == {"A": 1, "AB": 3, "FULL": 6} and table["pruned"].isna().all()
    merges["B"].write_text("{}")
    with pytest.raises(DataError, match=r"no record of a merge .*B\.json"):
        write_summary(results, tmp_path / "summary.csv", tmp_path / "comparisons.csv", told)
