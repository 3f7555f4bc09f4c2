"""What a user asks of Snakemake about a finished run: its report, its summary, the graph of its rules."""

import re


def test_a_report_is_one_file_with_all_pages_and_costs_no_measurement(finished):
    finished.config["report"] = True
    assert finished.jobs() == {"strength": 3, "report_pages": 1}
    assert "Nothing to be done" in finished.snakemake()
    finished.snakemake("--report", "report.html")
    # How it is run is no matter of the pages.
    finished.config |= {"threads": 1, "keep_activations": False}
    finished.config["experiments"]["tiny"]["perplexity"]["shards"] = 3
    assert finished.planned() == {}
    report = (finished.folder / "report.html").read_text()
    for page in ("results", "stages", "layers", "training", "jobs"):
        assert f"results/report/{page}.html" in report
    assert "A dense language model was cut" in report  # the front page
    # Of every job there is a benchmark, and that of the pages themselves was not there yet.
    jobs = len(list((finished.folder / "benchmarks").rglob("*.tsv"))) - 1
    assert f"<h2>{jobs} jobs, " in (finished.folder / "results/report/jobs.html").read_text()
    # Nothing of it lies elsewhere.
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\\\"']*(?:https?:)?//", report)

    summary = [line.split("\t") for line in finished.snakemake("--summary").splitlines() if line.startswith("results/")]
    assert len(summary) > 20 and {line[-1] for line in summary} == {"no update"}
    graph = finished.snakemake("--rulegraph")
    assert graph[graph.index("digraph") :].count("->") > 15 and '"report_pages"' in graph
