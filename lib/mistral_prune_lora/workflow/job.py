"""How a workflow script names what its job reads: by the files, so that a prefix of another workflow holds too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def folders(files: str | Sequence[str]) -> list[Path]:
    """The directories that some input files lie in, in their order; the first file of each lies at its top."""
    listed = [files] if isinstance(files, str) else files
    found: list[Path] = []
    for parent in (Path(file).parent for file in listed):
        if not any(parent == known or known in parent.parents for known in found):
            found.append(parent)
    return found


def folder(files: str | Sequence[str]) -> Path:
    """The one directory that some input files lie in."""
    return folders(files)[0]


def windows_file(record: str | Sequence[str]) -> Path:
    """The windows whose record is a job's input."""
    return Path(record if isinstance(record, str) else record[0]).with_suffix(".safetensors")
