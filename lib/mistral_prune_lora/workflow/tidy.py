"""What lies in results/shared and nobody asks for or links to any more, removed on request."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


def unused(shared: Path, asked_for: Iterable[str | Path]) -> list[Path]:
    """The artefacts that no configuration's result needs.

    An artefact stays if it is asked for, or if an experiment's folder holds one of its files: of another configuration,
    or of an experiment that has left this one. Activations, teacher's states and windows are linked to by nobody, so
    those of another configuration go; they are made again when they are needed, and no result is touched.

    Args:
        shared: results/shared.
        asked_for: paths of artefacts: directories, or files.
    """
    wanted = {os.path.abspath(path) for path in asked_for}
    linked = {_inode(file) for file in _files(shared.parent) if shared not in file.parents}
    artefacts = (path for kind in sorted(shared.iterdir()) if kind.is_dir() for path in sorted(kind.iterdir()))
    return [
        path
        for path in artefacts
        if os.path.abspath(path) not in wanted and not any(_inode(file) in linked for file in _files(path))
    ]


def tidy(shared: str | Path, asked_for: Iterable[str | Path]) -> int:
    """Remove what `unused` names, a line each on stdout; returns the bytes that this freed."""
    freed = 0
    for path in unused(Path(shared), asked_for) if Path(shared).is_dir() else []:
        size = sum(file.stat().st_size for file in _files(path))
        print(f"{path}: {size / 1e6:.1f} MB removed")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        freed += size
    print(f"{freed / 1e9:.2f} GB freed")
    return freed


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else iter([path])


def _inode(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_dev, state.st_ino
