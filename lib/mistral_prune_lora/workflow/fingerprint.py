"""A digest of the code that a job runs, so that editing the library reruns what the edit touches and nothing else.

Snakemake notices an edited script, but not an edited module that the script imports. Each rule therefore carries the
digest of its library modules as a param. Read as text: nothing is imported while the DAG is built.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = "mistral_prune_lora"
_ROOT = Path(__file__).parents[1]
# How a result is shown, an error worded, what a record says of versions, or which model is refused does not change it.
_WITHOUT_EFFECT = {
    f"{_PACKAGE}.{name}"
    for name in ("console", "errors", "provenance", "checkpoints.families", "checkpoints.family_tensors")
}


def code_digest(*modules: str) -> str:
    """The sha256 (16 hex digits) over the sources of library modules and of all library modules they import.

    Comments and blank lines count: a digest that parsed them away would be cleverer than it is safe.

    Args:
        modules: names of modules within the library, e.g. "merging.merge" or "console". A package's name is none: its
            `__init__.py` imports nothing, so the digest would never change.

    Raises:
        FileNotFoundError: there is no such module.
    """
    sources = sorted(_closure(tuple(f"{_PACKAGE}.{name}" for name in modules)))
    digest = hashlib.sha256()
    for name in sources:
        digest.update(f"{name}\0".encode() + _path(name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _closure(names: tuple[str, ...]) -> set[str]:
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in _WITHOUT_EFFECT:
            seen.add(name)
            waiting.extend(_imports(name))
    return seen


@cache
def _imports(name: str) -> tuple[str, ...]:
    """The library modules that a module imports anywhere, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(_path(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names a module in its list, `from package.module import x` before it.
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(f for f in found if f.startswith(f"{_PACKAGE}.") and _exists(f))


def _exists(name: str) -> bool:
    try:
        _path(name)
    except FileNotFoundError:
        return False
    return True


def _path(name: str) -> Path:
    path = _ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"no module {name} in {_ROOT}")
    return path
