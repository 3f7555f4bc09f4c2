"""Statistics over seeds, worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results.seeds import COLUMNS, write_seeds

IDS = "1" * 64


def row(experiment, ppl, kl=None, *, variant="merged", stage="A", dataset="text", ids=IDS):
    return {
        "experiment": experiment, "dataset": dataset, "variant": variant, "stage": stage, "ppl": ppl,
        "mean_nll": math.log(ppl), "kl_dense": kl, "ids_sha256": ids, "warnings": "",
    }  # fmt: skip


def statistics(folder, rows, sweeps):
    pd.DataFrame(rows).to_csv(folder / "summary.csv", index=False)
    write_seeds(folder / "summary.csv", sweeps, folder / "seeds.csv")
    return pd.read_csv(folder / "seeds.csv", keep_default_na=True)


def seed(value, **others):
    return ("many", {"distill.seed": value, **others})


def test_mean_and_standard_deviation_over_seeds(tmp_path):
    ppl, kl = [10.0, 12.0, 17.0], [0.1, 0.2, 0.6]
    rows = [row(f"s{i}", ppl[i], kl[i]) for i in range(3)] + [row("alone", 5.0)]
    table = statistics(tmp_path, rows, {f"s{i}": seed(i) for i in range(3)})
    assert table.columns.tolist() == list(COLUMNS) and len(table) == 1
    found = table.iloc[0]
    assert (found.experiment, found.dataset, found.variant, found.stage) == ("many", "text", "merged", "A")
    assert found.n == 3 and found.seeds == "0 1 2" and pd.isna(found["values"])
    assert found.ppl_mean == pytest.approx(13.0) and found.ppl_sd == pytest.approx(math.sqrt(13.0))  # (9 + 1 + 16) / 2
    assert found.mean_nll_sd == pytest.approx(np.std(np.log(ppl), ddof=1))
    assert found.kl_dense_mean == pytest.approx(0.3) and found.kl_dense_sd == pytest.approx(math.sqrt(0.07))


def test_groups_are_of_equal_other_values_and_of_one_result(tmp_path):
    sweeps = {f"t{t}s{s}": seed(s, **{"distill.loss.temperature": t}) for t in (1, 2) for s in (0, 1)}
    rows = [row(name, 10.0 + s, stage=stage) for s, name in enumerate(sweeps) for stage in ("A", "AB")]
    table = statistics(tmp_path, rows, sweeps)
    assert table[["values", "stage", "n"]].values.tolist() == [
        ['{"distill.loss.temperature": 1}', "A", 2], ['{"distill.loss.temperature": 1}', "AB", 2],
        ['{"distill.loss.temperature": 2}', "A", 2], ['{"distill.loss.temperature": 2}', "AB", 2],
    ]  # fmt: skip
    assert table.ppl_mean.tolist() == [10.5, 10.5, 12.5, 12.5]


def test_what_a_seed_has_no_number_for_has_no_mean(tmp_path):
    rows = [row("s0", 10.0, 0.1), row("s1", 12.0, None), row("s0", 9.0, stage="AB")]
    table = statistics(tmp_path, rows, {"s0": seed(0), "s1": seed(1)})
    both, single = table.iloc[0], table.iloc[1]
    assert both.n == 2 and both.ppl_mean == 11.0 and pd.isna(both.kl_dense_mean) and pd.isna(both.kl_dense_sd)
    assert single.n == 1 and single.ppl_mean == 9.0 and pd.isna(single.ppl_sd)


def test_a_sweep_over_something_else_has_no_seeds(tmp_path):
    table = statistics(tmp_path, [row("x", 10.0)], {"x": ("many", {"distill.loss.temperature": 1})})
    assert table.empty and table.columns.tolist() == list(COLUMNS)


def test_seeds_on_other_token_ids_are_refused(tmp_path):
    rows = [row("s0", 10.0), row("s1", 12.0, ids="2" * 64)]
    with pytest.raises(DataError, match=r"seeds of many, text, merged, A were measured on different token ids"):
        statistics(tmp_path, rows, {"s0": seed(0), "s1": seed(1)})
    assert not (tmp_path / "seeds.csv").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "be read as a table"), ("a,b\n1,2\n", "has no column experiment"), ("ppl\nten\n", "cannot be read"),
     (None, "No such file")],
)  # fmt: skip
def test_what_is_no_summary_is_refused(tmp_path, content, told):
    if content is not None:
        (tmp_path / "summary.csv").write_text(content)
    with pytest.raises(DataError, match=told):
        write_seeds(tmp_path / "summary.csv", {}, tmp_path / "seeds.csv")
