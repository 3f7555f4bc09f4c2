"""JSON as this pipeline writes it: indented, for people to read too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write_json(path: Path, content: Mapping) -> None:
    """Write an object to a file; the caller makes the result atomic (see transaction.py)."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
