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
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage.json_file import read_json_if_there, write_json
from mistral_prune_lora.storage.transaction import atomic_file

_PACKAGE = "mistral_prune_lora"
_ROOT = Path(__file__).parents[1]
# A module, and the names that are taken from it: none for `import module`.
_Import = tuple[str, tuple[str, ...]]
_Parsed = tuple[str, tuple[_Import, ...]]  # the sha256 of what counts, and what is imported
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


class Code:
    """Digests of scripts, and in a file from process to process what was read of each module, by what its file holds.

    A file is not edited while one of these is in use.
    """

    def __init__(self, memory: str | Path | None = None) -> None:
        """Args: memory: the file to remember in; one that is missing, malformed or of another reader is begun anew."""
        self._memory = None if memory is None else Path(memory)
        # What is remembered is what this Python's parser and this module made of a source.
        self._reader = hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes()).hexdigest()
        self._known = self._remembered()
        self._read: dict[Path, str] = {}
        self._learnt = False

    def digest(self, script: Path) -> str:
        """The sha256 (16 hex digits) over a workflow script and all library modules that it imports, and they import.

        Args:
            script: the file that a rule's `script` names.

        Raises:
            FileNotFoundError: there is no such script, or it or a module imports a library module that is not there.
        """
        own, imports = self._parsed(script)
        digest = hashlib.sha256(bytes.fromhex(own))
        for name in sorted(self._closure(imports)):
            digest.update(f"{name}\0".encode() + bytes.fromhex(self._parsed(_path(name))[0]))
        return digest.hexdigest()[:16]

    def keep(self) -> None:
        """Remember what was read, if any of it is new. That it cannot be written costs time, and nothing else."""
        if self._memory is None or not self._learnt:
            return
        used = {source: self._known[source] for source in sorted(set(self._read.values()))}
        with suppress(PipelineError, OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._memory) as fresh:
                write_json(fresh, {"reader": self._reader, "sources": used})
            self._learnt = False

    def _closure(self, imports: Iterable[_Import]) -> set[str]:
        seen: set[str] = set()
        waiting = _modules(imports)
        while waiting:
            name = waiting.pop()
            if name not in seen and name not in _WITHOUT_EFFECT:
                seen.add(name)
                waiting += _modules(self._parsed(_path(name))[1])
        return seen

    def _parsed(self, file: Path) -> _Parsed:
        if file not in self._read:
            source = file.read_bytes()
            self._read[file] = hashlib.sha256(source).hexdigest()
            if self._read[file] not in self._known:
                self._known[self._read[file]], self._learnt = _parse(source), True
        return self._known[self._read[file]]

    def _remembered(self) -> dict[str, _Parsed]:
        if self._memory is not None:
            with suppress(PipelineError, AttributeError, KeyError, TypeError, ValueError):
                kept = read_json_if_there(self._memory) or {}
                if kept.get("reader") == self._reader:
                    return {name: (_hex(own), _imports(imports)) for name, (own, imports) in kept["sources"].items()}
        return {}


def _hex(digest: str) -> str:
    return bytes.fromhex(digest).hex()


def _imports(kept: Iterable) -> tuple[_Import, ...]:
    return tuple((str(module), tuple(map(str, names))) for module, names in kept)


def _parse(source: bytes) -> _Parsed:
    """A source's digest, and what it imports of the library anywhere, also inside functions."""
    tree = ast.parse(source)
    imports: list[_Import] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            imports += [(alias.name, ()) for alias in node.names if _is_ours(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            imports.append((node.module, tuple(alias.name for alias in node.names)))
        elif isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        # An expression holds no import and no docstring.
        waiting += [inner for inner in ast.iter_child_nodes(node) if not isinstance(inner, ast.expr)]
    return hashlib.sha256(ast.dump(tree, annotate_fields=False).encode()).hexdigest(), tuple(imports)


def _is_ours(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")


def _modules(imports: Iterable[_Import]) -> list[str]:
    """The modules of `from package import module`, which stand in its list, or of `from package.module import x`.

    Which of both an import is lies with the folders and is never remembered.
    """
    modules = []
    for module, names in imports:
        modules += [f"{module}.{name}" for name in names] if names and _folder(module).is_dir() else [module]
    return modules


def _folder(name: str) -> Path:
    return _ROOT.joinpath(*name.split(".")[1:])


def _path(name: str) -> Path:
    path = _folder(name).with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"no module {name} in {_ROOT}")
    return path
