"""What a user asks of Snakemake about a finished run: its report, its summary, the graph of its rules."""

import copy
import re
import subprocess

import pytest
from chromium import CHROMIUM, DRAWN, NO_CHROMIUM, SIZES
from made_once import made_once
from report_results import PAGES
from workflow_project import Project, configuration


@pytest.fixture(scope="module")
def reported(first_run, tmp_path_factory):
    """A finished project with its report.html, and the jobs that were run for it."""
    config = configuration() | {"report": True}

    def report(folder):
        subprocess.run(["cp", "-a", f"{first_run[0].folder}/.", folder], check=True)
        project = Project(folder, config)
        jobs = project.jobs()
        project.snakemake("--report", "report.html")
        return jobs

    folder, jobs = made_once(tmp_path_factory, "report", report)
    return Project(folder, config), jobs


def test_a_report_is_one_file_with_all_pages_and_costs_no_measurement(reported):
    finished, jobs = reported
    assert jobs == {"strength": 3, "report_pages": 1}
    assert "Nothing to be done" in finished.snakemake()
    # How it is run is no matter of the pages.
    run_otherwise = copy.deepcopy(finished.config) | {"threads": 1, "keep_activations": False}
    run_otherwise["experiments"]["tiny"]["perplexity"]["shards"] = 3
    assert Project(finished.folder, run_otherwise).planned() == {}
    report = (finished.folder / "report.html").read_text()
    for page in PAGES:
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


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_the_report_is_read_in_a_browser_without_a_network(reported):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    own = (reported[0].folder / "report.html").as_uri()
    wrong, figures = [], {}
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1280, 400):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.on("request", lambda a: wrong.append(a.url) if not a.url.startswith((own, "data:")) else None)
            # Snakemake's own pages warn that they bring a compiler of styles with them.
            tab.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.goto(own)
            tab.get_by_text("A dense language model was cut").wait_for()
            for category in ("1 Results", "2 Stages", "3 Layers", "4 Training", "5 Jobs"):
                tab.locator("nav").get_by_text(category, exact=True).last.click()
                for row in tab.locator("nav tbody tr").all():
                    row.locator("a[iconname=eye]").first.click()
                    if "still" in row.inner_text():
                        image = tab.locator("img[src*='filename=perplexity.svg']")
                        image.wait_for()
                        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
                        continue
                    frame = tab.locator("iframe").element_handle().content_frame()
                    # A frame is empty at first, and of no figures every one is drawn.
                    loaded = "document.title && document.readyState === 'complete'"
                    frame.wait_for_function(f"{loaded} && {DRAWN}", timeout=20_000)
                    inside = frame.evaluate("window.innerWidth")
                    assert frame.evaluate("document.documentElement.scrollWidth") <= inside <= width, category
                    sizes = frame.evaluate(SIZES)
                    for left, right, height, drawn, high in sizes:
                        assert left >= 0 and right <= inside and right - left > 250 and height > 80, category
                        assert drawn > 100 and high > 40, category
                    figures[width, category[2:]] = len(sizes)
                tab.locator("nav ol a").first.click()  # back to all categories
        browser.close()
    assert wrong == []
    of_each = {"Results": 0, "Stages": 5, "Layers": 1, "Training": 0, "Jobs": 2}
    assert figures == {(width, name): count for width in (1280, 400) for name, count in of_each.items()}
