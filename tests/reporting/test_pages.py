"""What pages say: intervals, figures, tables."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from report_results import PAGES, PREDICTED, gathered, write_result, write_results, write_whole_report
from scipy.stats import t as student

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.reporting.charts import with_intervals
from mistral_prune_lora.reporting.front import results_table
from mistral_prune_lora.reporting.gathered import Told
from mistral_prune_lora.reporting.making import jobs_of
from mistral_prune_lora.reporting.stages import POINTS, along_text_charts, perplexity_chart
from mistral_prune_lora.reporting.tables import searchable
from mistral_prune_lora.reporting.written import write_pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of a report with everything in it, as text."""
    return {n: p.read_text() for n, p in write_whole_report(tmp_path_factory.mktemp("report")).items()}


def rows_of(chart):
    """Every row of data that a chart holds."""
    return [row for rows in chart["datasets"].values() for row in rows]


def test_intervals_are_students_over_windows(tmp_path):
    results = write_results(tmp_path, "one", 12)
    rows = with_intervals(gathered(tmp_path, results).summary).set_index(["variant", "stage"])
    for named in results:
        scores = pd.read_parquet(named.path.with_suffix(".parquet"))
        row, means = rows.loc[(named.variant, named.stage)], scores.nll / PREDICTED
        low, high = student.interval(0.95, 11, loc=means.mean(), scale=means.sem())
        assert (row.low, row.high) == pytest.approx((math.exp(low), math.exp(high)))
        if named.variant == "dense":
            assert math.isnan(row.kl_low)
        else:
            means = scores.kl / PREDICTED
            interval = student.interval(0.95, 11, loc=means.mean(), scale=means.sem())
            assert (row.kl_low, row.kl_high) == pytest.approx(interval)
    drawn = {
        (row["variant"], row["stage"]): row for row in rows_of(perplexity_chart(gathered(tmp_path, results).summary))
    }
    assert drawn.keys() == set(rows.index)
    assert all(drawn[place]["high"] == pytest.approx(rows.loc[place].high) for place in drawn)


def test_a_single_window_has_a_number_and_no_interval(tmp_path):
    table = results_table(gathered(tmp_path, write_results(tmp_path, "one", 1)).summary)
    assert "[" not in table and "nan" not in table.lower()
    assert len(re.findall(r"<td class=\"number\">\d+\.\d+</td>", table)) == 7 + 6  # of PPL and of KL


def test_an_experiment_has_the_name_that_it_was_given(tmp_path):
    read = gathered(tmp_path, write_results(tmp_path, "null", 3, dataset="007"))
    for table in (read.summary, read.comparisons):
        assert {*table.experiment} == {"null"} and {*table.dataset} == {"007"}


def test_differences_along_a_long_text_are_means_over_neighbours(tmp_path):
    windows = 2 * POINTS + 1
    found = gathered(tmp_path, write_results(tmp_path, "one", windows))
    charts = along_text_charts(found, "one", "text")
    assert list(charts) == ["A", "AB", "FULL"]
    points = [row for row in rows_of(charts["AB"]) if row.get("variant") == "merged"]
    assert [(row["first"], row["last"]) for row in points] == [
        (n, min(n + 2, windows - 1)) for n in range(0, windows, 3)
    ]
    ours, dense = found.windows["one", "text", "merged", "AB"], found.windows["one", "text", "dense", "FULL"]
    expected = ((ours.nll - dense.nll) / PREDICTED)[-2:].mean()  # the last point has what is left over
    assert points[-1]["difference"] == pytest.approx(expected)


def test_without_a_dense_result_nothing_is_compared_with_one(tmp_path):
    results = [write_result(tmp_path, ("one", "text", "pruned", stage), 40) for stage in ("A", "AB", "FULL")]
    found = gathered(tmp_path, results)
    assert along_text_charts(found, "one", "text") == {}
    assert {row["variant"] for row in rows_of(perplexity_chart(found.summary))} == {"pruned"}


def test_every_figure_that_there_is_data_for_is_there(pages):
    titles = {name: re.findall(r"<figcaption><h3>(.*?)</h3>", pages[name]) for name in PAGES}
    along = [f"Along the text, {stage}" for stage in ("A", "AB", "FULL")]
    assert titles == {
        "results": [],
        "stages": ["Perplexity by stage", "Divergence from the dense model", *along] * 2,
        "layers": ["Ranking of blocks", "Strength of the adapters, merged"],
        "training": ["Adapter of A", "Adapter of B"],
        "jobs": ["Time", "Memory"],
    }
    for name in PAGES:
        assert pages[name].count('class="chart" data-chart=') == len(titles[name])
    assert "snakemake results/plain/importance.svg" in pages["layers"]  # how a ranking that is missing is made


def test_what_is_behind_the_numbers_is_on_the_first_page_and_no_text_becomes_markup(pages):
    front, results = pages["front"], pages["results"]
    for page in (front, results):
        assert "&lt;b&gt;tiny&lt;/b&gt;" in page and "<b>tiny</b>" not in page
        assert "plain on short: a single window" in page
    assert "seed: 1" in results and "5" * 64 in results and "layers [0, 1] on cpu" in results


def test_jobs_of_other_configurations_are_left_out(pages):
    assert "2 jobs, 0.1 minutes" in pages["jobs"] and "gone" not in pages["jobs"]


@pytest.fixture
def benchmarks(tmp_path):
    """Leaves a benchmark of each of some jobs, and returns their folder."""

    def leave(*jobs, content="s\th:m:s\tmax_rss\n2.5\t0:00:02\t10\n"):
        for job in jobs:
            (tmp_path / job).parent.mkdir(exist_ok=True)
            (tmp_path / f"{job}.tsv").write_text(content)
        return tmp_path

    return leave


def test_every_job_of_the_configuration_is_counted(benchmarks):
    made = ["M-1", "P-2", "F-3", "tiny", "dense"]
    own = ["segment/M-1", "segment/M-1.1-of-2", "segment/M-1.2-of-2", "closed_form/F-3", "choose/P-2"]
    own += ["importance/tiny", "export_stage/tiny.merged.AB", "fetch_hub_model/dense"]
    folder = benchmarks(*own, "segment/M-9.1-of-2", "closed_form/F-30", "importance/tiny2", "export_stage/t.merged.AB")
    benchmarks(*(f"{rule}{of}" for rule in ("summary", "plot_perplexity", "report_pages") for of in ("", ".m-7b")))
    jobs = jobs_of(folder, made)
    assert {*zip(jobs.rule, jobs.job, strict=True)} == {
        *((rule, job) for rule, job in (name.split("/") for name in own)),
        ("summary", "summary"),
        ("plot_perplexity", "plot_perplexity"),
    }
    assert jobs.groupby("rule").seconds.sum()["segment"] == 7.5
    other = jobs_of(folder, ["M-9"], ".m-7b")
    assert sorted(other.job) == ["M-9.1-of-2", "plot_perplexity.m-7b", "summary.m-7b"]
    assert sorted(other.rule) == ["plot_perplexity", "segment", "summary"]


def test_a_benchmark_that_is_being_written_is_left_out(benchmarks):
    benchmarks("summary")
    assert list(jobs_of(benchmarks("plot_perplexity", content=""), []).job) == ["summary"]


def test_numbers_of_a_table_are_short_to_read_and_whole_to_sort_by():
    cells = searchable(pd.DataFrame({"n": [1 / 3, np.nan, 2e6], "word": ["<i>", None, "a" * 64]}), "x")
    assert 'data-value="0.3333333333333333" title="0.3333333333333333">0.33333</td>' in cells
    assert '<td class="number" data-value=""></td>' in cells and ">2,000,000</td>" in cells
    assert "&lt;i&gt;" in cells and f'<td title="{"a" * 64}">{"a" * 12}</td>' in cells


def test_a_table_that_lacks_a_column_is_named_and_no_page_is_left_half(tmp_path):
    (tmp_path / "training.csv").write_text("step,loss\n1,2\n")
    told = Told({"one": {}}, {}, trainings=[("one", "A", str(tmp_path / "training.csv"))])
    found = gathered(tmp_path, write_results(tmp_path, "one", 2), told)
    with pytest.raises(DataError, match="no column kl") as refused:
        write_pages(found, tmp_path, {name: tmp_path / f"{name}.html" for name in ("front", *PAGES)})
    assert str(tmp_path / "training.csv") in str(refused.value)
    assert not (tmp_path / "training.html").exists()


def test_the_same_results_give_the_same_bytes(pages, tmp_path):
    again = {name: path.read_text() for name, path in write_whole_report(tmp_path).items()}
    # Places of files are told nowhere, so that another folder changes nothing.
    assert {name for name in again if again[name] != pages[name]} == set()
    assert json.dumps(str(tmp_path))[1:-1] not in "".join(again.values())
