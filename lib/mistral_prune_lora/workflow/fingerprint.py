"""A digest of the code that a job runs, so that editing the library reruns what the edit touches and nothing else.

Snakemake notices an edited script, but not an edited module that the script imports. Each rule therefore carries the
digest of its script and of every library module that the script reaches as a param. Files are parsed: nothing is
imported while the DAG is built.

What counts of a file is its syntax tree without docstrings, so an edited comment, docstring or line break reruns
nothing. That is safe: comments and layout do not reach the compiler, and docstrings reach nothing but `__doc__` and
`inspect.getdoc`, which no module reads and no number could follow from (a test holds both). Python's own parser makes
the tree, and another Python version may make another one of the same file: it may rerun jobs, but never leaves one out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_PACKAGE = "mistral_prune_lora"
_ROOT = Path(__file__).parents[1]
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# How a result is shown, an error worded, what a record says of versions, how fast libraries are imported, or which
# model is refused does not change it.
_WITHOUT_EFFECT = {
    f"{_PACKAGE}.{name}"
    for name in (
        "console",
        "errors",
        "provenance",
        "quick_imports",
        "checkpoints.families",
        "checkpoints.family_tensors",
    )
}


def script_digest(script: Path) -> str:
    """The sha256 (16 hex digits) over a workflow script and all library modules that it imports, and they import.

    Args:
        script: the file that a rule's `script` names.

    Raises:
        FileNotFoundError: there is no such script, or it or a module imports a library module that is not there.
    """
    own, imported = _parsed(script)
    digest = hashlib.sha256(own)
    for name in sorted(_closure(imported)):
        digest.update(f"{name}\0".encode() + _parsed(_path(name))[0])
    return digest.hexdigest()[:16]


def _closure(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in _WITHOUT_EFFECT:
            seen.add(name)
            waiting.extend(_parsed(_path(name))[1])
    return seen


@cache
def _parsed(file: Path) -> tuple[bytes, tuple[str, ...]]:
    """A file's digest, and the library modules that it imports anywhere, also inside functions.

    Remembered, since the rules share nearly all modules, and a file is not edited while they are read.
    """
    tree, names = ast.parse(file.read_text(encoding="utf-8")), []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if _is_ours(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            names += _named(node)
        elif isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        # An expression holds no import and no docstring.
        waiting += [inner for inner in ast.iter_child_nodes(node) if not isinstance(inner, ast.expr)]
    digest = hashlib.sha256(ast.dump(tree, annotate_fields=False).encode()).digest()
    return digest, tuple(names)


def _is_ours(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")


def _named(node: ast.ImportFrom) -> list[str]:
    """The modules of `from package import module`, which stand in its list, or of `from package.module import x`."""
    if _folder(str(node.module)).is_dir():
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [str(node.module)]


def _folder(name: str) -> Path:
    return _ROOT.joinpath(*name.split(".")[1:])


def _path(name: str) -> Path:
    path = _folder(name).with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"no module {name} in {_ROOT}")
    return path
