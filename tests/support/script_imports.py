"""The imports of a rule's script, without its work."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "workflow_scripts"


def imports_of(script: Path, shards: Sequence[str] = ()) -> str:
    """The imports of a script, without its work; of a job that gathers these shards."""
    body = ast.parse(script.read_text()).body
    only = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom | ast.With)]
    work = [node for node in only if isinstance(node, ast.With) and "job" in ast.unparse(node.items[0])]
    given = f"from types import SimpleNamespace as Given\nsnakemake = Given(input=Given(shards={shards!r}))\n"
    return given + ast.unparse([node for node in only if node not in work])
