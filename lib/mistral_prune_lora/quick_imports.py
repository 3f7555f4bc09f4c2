"""Importing large libraries without what costs time and is of no use here. Imports nothing heavy."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_READS = "create_import_structure_from_path"  # in transformers.utils.import_utils


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers or pandas in less than two thirds of the time, and leave the process faster.

    What an import makes stays until the process ends. Python's collector does not know: while a million objects come
    into being, it looks through all of them several times, again later during the work, and once more at the end. Here
    it does not look while they are imported, and what is there afterwards is left out of its later rounds. Objects that
    nobody refers to any more are freed as ever, and what the work makes is collected as ever.

    Of transformers, what takes a second and is for models of other kinds is left out: it believes that there is no
    scipy, and it reads the sources of all its models once, not twice. Whoever imports scipy afterwards finds it, but
    transformers itself believes so for as long as the process lives.

    For the imports at the start of a process, before any work: what lies in a reference cycle by then is never freed.
    """
    collects, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with _without_scipy(), _models_read_once():
            yield
    finally:
        if len(sys.modules) > known:  # else this process works already, and there may be models in cycles
            gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Hide scipy from imports: transformers' losses for finding objects in pictures import a large part of it."""
    if "scipy" in sys.modules:
        yield
        return
    hidden: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    hidden["scipy"] = None  # how Python says that a module is not there
    try:
        yield
    finally:
        del hidden["scipy"]


@contextmanager
def _models_read_once() -> Iterator[None]:
    finder = _ModelsReadOnce()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.undo()


class _ModelsReadOnce(MetaPathFinder):
    """Hands on to `transformers.models` what `transformers` has found out: the names in the sources of all models.

    Both read the same folder of two thousand files. A cache is between them, but the first asks with the folder and the
    second with a file in it, and for the subfolders the cache is too small. This finder finds nothing: it is here to be
    told of an import before it happens.
    """

    def __init__(self) -> None:
        self._lookup: ModuleType | None = None
        self._plain: Any = None

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Before `transformers.models` is imported, let its question be the one that was answered."""
        if fullname != "transformers.models" or self._lookup:
            return
        lookup = sys.modules.get("transformers.utils.import_utils")
        self._plain = getattr(lookup, _READS, None)
        if self._plain:  # another version of transformers may do it in another way
            self._lookup = lookup
            setattr(lookup, _READS, self._of_folder)

    def undo(self) -> None:
        """Let transformers look up again as it does by itself."""
        if self._lookup:
            setattr(self._lookup, _READS, self._plain)

    def _of_folder(self, place: str | Path) -> object:
        place = Path(place)
        return self._plain(place.parent if place.is_file() else place)


def huge_pages() -> None:
    """Let torch put large tensors on a CPU into huge pages, unless THP_MEM_ALLOC_ENABLE says otherwise.

    To be called before torch is imported. Their memory then goes back to the system when they are freed, where the heap
    would keep holes between them: a training's peak was 2.1 GB instead of 2.75, in the same time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
