"""One page of the report: headings, figures, tables, and the scripts that they need, all in the file itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mistral_prune_lora.reporting.looks import SCRIPT, STYLE
from mistral_prune_lora.storage.transaction import atomic_file

# Nothing is fetched, and the menu of a figure leads nowhere: what it offers is made in the page.
_GLOBAL = "window.vegaEmbed = vegaEmbed;"
_EMBED = {"actions": {"export": True, "source": False, "compiled": False, "editor": False}, "renderer": "svg"}


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and what is to be seen on it.

    Attributes:
        title: its heading.
        caption: a sentence or two, plain text.
        chart: a Vega-Lite specification.
    """

    title: str
    caption: str
    chart: dict


@dataclass(frozen=True)
class Section:
    """A heading, with what stands below it.

    Attributes:
        title: the heading.
        lead: HTML above the figures.
        figures: side by side where the page is wide enough.
        body: HTML below them.
    """

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    body: str = ""


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page, whole or not at all. The same sections give the same bytes.

    Args:
        path: the HTML file.
        title: its first heading.
        sections: in their order. Only a page that has figures carries the library that draws them.
    """
    figures = [figure for section in sections for figure in section.figures]
    body = "\n".join(_section(section, figures) for section in sections)
    scripts = [SCRIPT]
    if figures:
        # `<\/`: no text within a specification can end the script that it stands in.
        charts = json.dumps([figure.chart for figure in figures], sort_keys=True).replace("</", "<\\/")
        scripts = [_vega(), f"drawFigures({charts}, {json.dumps(_EMBED)});"]
        scripts.insert(1, SCRIPT)
    tags = "\n".join(f"<script>{script}</script>" for script in scripts)
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main class="pages">
<h1>{escape(title)}</h1>
{body}
</main>
{tags}
</body>
</html>
"""
    with atomic_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def _section(section: Section, figures: Sequence[Figure]) -> str:
    drawn = "\n".join(
        f"<figure><figcaption><h3>{escape(figure.title)}</h3><p>{escape(figure.caption)}</p></figcaption>"
        f'<div class="chart" data-chart="{figures.index(figure)}"></div></figure>'
        for figure in section.figures
    )
    grid = f'<div class="figures">{drawn}</div>' if drawn else ""
    return f"<section><h2>{escape(section.title)}</h2>{section.lead}{grid}{section.body}</section>"


@functools.cache  # it takes more than a second, and every page with figures carries the same
def _vega() -> str:
    """Vega, Vega-Lite and their embedding as one script, out of the package that also holds their licences."""
    import vl_convert

    return vl_convert.javascript_bundle(_GLOBAL).replace("</script", "<\\/script")
