"""Small pictures of a report's pages for the documents, by Chromium: python docs/screenshots.py RESULTS."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
IMAGES = Path(__file__).parent / "images"
# What is shown of which page: everything from the top of the first selector's element to the end of the last's.
SHOTS = {
    "report-stages": ("stages", "h1", ".pages .figures figure:nth-of-type(3)"),
    "report-layers": ("layers", "h1", ".pages section:nth-of-type(1)"),
}
WIDTH = 1100  # CSS pixels, as wide as a page of GitHub shows pictures
LARGEST = 100_000  # bytes
EDGE = 12  # CSS pixels around what is shown


def take(pages: Path, output: Path, scale: float) -> list[Path]:
    """Write a PNG of each of SHOTS.

    Args:
        pages: a folder `results/report`.
        output: the folder for pictures.
        scale: pixels of the picture for each CSS pixel.

    Raises: SystemExit, without a Chromium or with a picture that became larger than LARGEST.
    """
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if browser_path is None:
        sys.exit(f"no {' or '.join(CHROMIUMS)} is installed; Debian's package is `chromium`")
    output.mkdir(parents=True, exist_ok=True)
    made = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=scale)
        for name, (page, first, last) in SHOTS.items():
            tab.goto((pages / f"{page}.html").resolve().as_uri())
            tab.wait_for_function("[...document.querySelectorAll('.chart')].every(chart => chart.dataset.drawn)")
            # A menu to save a figure says nothing in a picture.
            tab.add_style_tag(content=".vega-embed summary { display: none !important; }")
            top, bottom = tab.locator(first).first.bounding_box(), tab.locator(last).first.bounding_box()
            if top is None or bottom is None:
                sys.exit(f"{page}.html shows no {first} or no {last}")
            start = max(0, top["y"] - EDGE)
            clip = {"x": 0, "y": start, "width": WIDTH, "height": bottom["y"] + bottom["height"] + EDGE - start}
            tab.screenshot(path=output / f"{name}.png", clip=clip, full_page=True)
            made.append(output / f"{name}.png")
        browser.close()
    for path in made:
        if path.stat().st_size > LARGEST:
            sys.exit(f"{path} has {path.stat().st_size} bytes; a smaller --scale makes it fit in {LARGEST}")
    return made


def main() -> None:
    """Take the pictures and name them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("results", type=Path, help="a finished run's results folder, with report/ in it")
    parser.add_argument("--output", type=Path, default=IMAGES, help="where the PNGs go")
    parser.add_argument("--scale", type=float, default=1.0, help="pixels for each CSS pixel")
    args = parser.parse_args()
    pages = args.results / "report"
    missing = sorted({page for page, *_ in SHOTS.values() if not (pages / f"{page}.html").is_file()})
    if missing:
        sys.exit(f"{pages} has no {missing[0]}.html; a finished run of a configuration with `report: true` has it")
    for path in take(pages, args.output, args.scale):
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
