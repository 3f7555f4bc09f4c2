"""The pages as a reader sees them, in Chromium without a network."""

import pytest
from chromium import CHROMIUM, DRAWN, NO_CHROMIUM, SIZES
from report_results import PAGES, write_whole_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

# Labels of one axis whose boxes lie over each other.
OVERLAPS = """() => [...document.querySelectorAll('.role-axis-label, .role-legend-label')].flatMap(group => {
  const boxes = [...group.querySelectorAll('text')].filter(text => text.style.opacity !== '0'
    && text.getAttribute('opacity') !== '0' && text.textContent).map(text => [text.textContent,
    text.getBoundingClientRect()]);
  return boxes.flatMap(([a, one], n) => boxes.slice(n + 1).filter(([, two]) => one.left < two.right - 1
    && two.left < one.right - 1 && one.top < two.bottom - 1 && two.top < one.bottom - 1).map(([b]) => a + ' | ' + b));
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return write_whole_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, pages):
    """Opens a page at a width; at the end, that nothing was asked of a network and nothing went wrong is checked."""
    context = browser.new_context()
    wrong = []

    def open_page(name, width):
        tab = context.new_page()
        tab.set_viewport_size({"width": width, "height": 900})
        own = pages[name].as_uri()
        tab.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((own, "data:")) else None)
        tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(own)
        tab.wait_for_function(DRAWN, timeout=20_000)
        return tab

    yield open_page
    context.close()
    assert wrong == []


@pytest.mark.parametrize("width", [1280, 400])
def test_every_figure_is_seen_and_nothing_reaches_beyond_the_page(opened, width):
    figures = 0
    for name in PAGES:
        tab = opened(name, width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        for left, right, height, drawn, high in tab.evaluate(SIZES):
            assert left >= 0 and right <= width and right - left > 250 and height > 80, name
            assert drawn > 100 and high > 40, name
            figures += 1
        assert tab.evaluate(OVERLAPS) == [], name
    assert figures == 16


def test_tables_sort_by_a_click_and_are_searched(opened):
    tab = opened("results", 1280)
    ppl = tab.locator("#summary th", has_text="ppl").first
    place = ppl.evaluate("heading => heading.cellIndex")
    column = f"[...document.querySelectorAll('#summary tbody tr')].map(row => row.cells[{place}].dataset.value)"
    there = [float(value) for value in tab.evaluate(column)]
    assert len(there) == 14 and there != sorted(there)
    ppl.get_by_role("button").click()
    assert [float(value) for value in tab.evaluate(column)] == sorted(there)
    assert ppl.get_attribute("aria-sort") == "ascending"
    ppl.get_by_role("button").click()
    assert [float(value) for value in tab.evaluate(column)] == sorted(there, reverse=True)
    # What has no number comes last, whichever way: the standard error of a single window.
    error = tab.locator("#summary th", has_text="ppl_se")
    last = f"document.querySelector('#summary tbody tr:last-child').cells[{error.evaluate('e => e.cellIndex')}]"
    for _ in range(2):
        error.get_by_role("button").click()
        assert tab.evaluate(f"{last}.dataset.value") == ""

    search = tab.locator("input[data-table=summary]")
    search.fill("WHOLE merged")
    assert tab.locator("#summary tbody tr:visible").count() == 3
    search.fill("no such row")
    assert tab.locator("#summary tbody tr:visible").count() == 0
    search.fill("")
    assert tab.locator("#summary tbody tr:visible").count() == 14


def test_a_figure_tells_its_numbers_on_hovering_and_digests_unfold(opened):
    tab = opened("layers", 1280)
    tab.locator(".chart .mark-rect.role-mark path").last.hover(timeout=5000)
    assert "delta_norm" in tab.locator("#vg-tooltip-element").inner_text()
    tab = opened("results", 1280)
    folded = tab.get_by_text("weights: layers.000").first
    assert not folded.is_visible()
    for title in ("Layers and digests of every result", "whole on text, dense FULL"):
        tab.get_by_text(title, exact=True).click()
    assert folded.is_visible()
