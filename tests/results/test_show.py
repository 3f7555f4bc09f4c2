"""The table for the terminal."""

import pandas as pd
import pytest

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.results.show import WIDTH, summary_table


def row(experiment, variant, stage, ppl, *, kl=None, se=1.0, dataset="text", warnings=""):
    return {
        "experiment": experiment, "dataset": dataset, "variant": variant, "stage": stage, "ppl": ppl, "ppl_se": se,
        "kl_dense": kl, "warnings": warnings,
    }  # fmt: skip


def shown(folder, rows):
    pd.DataFrame(rows).to_csv(folder / "summary.csv", index=False)
    return summary_table(folder / "summary.csv")


ONE = [
    row("one", "dense", "FULL", 18.98, se=1.26),
    row("one", "pruned", "A", 55.37, kl=1.131, se=4.11),
    row("one", "pruned", "FULL", 18.98, kl=0.0, se=1.26),
    row("one", "merged", "A", 26.26, kl=0.693, se=1.76),
    row("one", "merged", "AB", 22.41, kl=0.525, se=None),
]


def test_a_row_a_stage_and_the_variants_side_by_side(tmp_path):
    table = shown(tmp_path, ONE).split("\n\n")[0]
    assert table.splitlines() == [
        "experiment  dataset  stage     dense PPL    pruned PPL  pruned KL    merged PPL  merged KL",
        "one         text     A                    55.37 ± 4.11      1.131  26.26 ± 1.76      0.693",
        "                     AB                                                   22.41      0.525",
        "                     FULL   18.98 ± 1.26  18.98 ± 1.26      0.000",
    ]


def test_experiments_and_datasets_stay_in_their_order(tmp_path):
    rows = [row("b", "pruned", "FULL", 2.0), row("a", "pruned", "A", 3.0), row("b", "pruned", "A", 4.0, dataset="0")]
    table = shown(tmp_path, rows).split("\n\n")[0]
    assert "KL" not in table and "dense" not in table
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["b", "text", "FULL"], ["a", "text", "A"], ["b", "0", "A"],
    ]  # fmt: skip


@pytest.mark.parametrize("length", [3, 30, 200])
@pytest.mark.parametrize("ppl", [1.5, 99_999.9, 1e5, 1e30])
def test_it_always_fits(tmp_path, length, ppl):
    names = [f"e{'x' * length}{i}" for i in range(2)]
    rows = [
        row(name, variant, stage, ppl, kl=12.3456, se=ppl, dataset="d" * length)
        for name in names for variant in ("dense", "pruned", "merged") for stage in ("A", "FULL")
    ]  # fmt: skip
    text = shown(tmp_path, rows).split("\n\n")[0]
    assert all(len(line) <= WIDTH for line in text.splitlines())
    told = [line.split()[0] for line in text.splitlines()[1::2]]
    assert told[0][-1] == "0" and told[1][-1] == "1"  # the ends of the names are left


def test_what_is_doubtful_and_where_the_files_are(tmp_path):
    text = shown(tmp_path, ONE)
    assert "are doubtful" not in text and "comparisons.csv" not in text and f"{tmp_path}/summary.csv" in text
    (tmp_path / "comparisons.csv").touch()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/perplexity.svg").touch()
    text = shown(tmp_path, [*ONE, row("two", "pruned", "A", 2.0, warnings="windows are long")])
    assert "1 of 6 results are doubtful: see the column warnings" in text
    assert f"{tmp_path}/comparisons.csv" in text and f"{tmp_path}/plots/perplexity.svg" in text


def test_beside_another_configuration_s_summary_are_its_own_files(tmp_path):
    shown(tmp_path, ONE)
    (tmp_path / "summary.csv").rename(tmp_path / "summary.other.more.csv")
    for name in ("comparisons.csv", "comparisons.other.more.csv", "baseline.other.more.csv"):
        (tmp_path / name).touch()
    text = summary_table(tmp_path / "summary.other.more.csv")
    assert "comparisons.other.more.csv" in text and "baseline.other.more.csv" in text and "comparisons.csv" not in text


def test_what_is_no_summary_is_refused(tmp_path):
    (tmp_path / "summary.csv").write_text("experiment,dataset\n")
    with pytest.raises(DataError, match=r"has no column stage .*summary\.csv"):
        summary_table(tmp_path / "summary.csv")
