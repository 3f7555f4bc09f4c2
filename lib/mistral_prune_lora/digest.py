"""Digests of files, for provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes in hex, read in blocks.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def other_files_sha256(folder: Path, known: Container[str]) -> dict[str, str]:
    """The sha256 of the files in a folder and below, by their path in it; not of those whose digest is known."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file_sha256(file) for name, file in files.items() if name not in known}
