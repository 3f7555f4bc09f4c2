"""Chromium, and what is asked of a page of the report in it."""

from __future__ import annotations

import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium; Debian's package is `chromium`"
DRAWN = "[...document.querySelectorAll('.chart')].every(chart => chart.dataset.drawn === 'yes')"
# Of each figure, the extents of its drawing and of what is drawn in it, in CSS pixels.
SIZES = """() => [...document.querySelectorAll('.chart')].map(chart => {
  const all = chart.querySelector('svg').getBoundingClientRect();
  const marks = chart.querySelector('svg .mark-group.role-frame, svg .role-mark').getBoundingClientRect();
  return [all.left, all.right, all.height, marks.width, marks.height];
})"""
