"""What a result was made by and from: versions of code, digests of files and of records. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Container, Mapping
from pathlib import Path

# pyproject.toml reads it from here, so that what is said is the version of the code that runs, installed or not.
VERSION = "0.1.0"
PACKAGE = "mistral-prune-lora"


def package_line() -> str:
    """The package's name, version and directory: mistral-prune-lora 0.1.0 (/path/to/mistral_prune_lora)."""
    return f"{PACKAGE} {VERSION} ({Path(__file__).resolve().parent})"


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages by name, of this one too where it is named: PACKAGE.

    Raises:
        importlib.metadata.PackageNotFoundError: one is not installed.
    """
    return {name: VERSION if name == PACKAGE else importlib.metadata.version(name) for name in packages}


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


def record_text(record: Mapping | list) -> str:
    """A record as JSON text that is the same for equal records, whatever the order of their keys."""
    return json.dumps(record, sort_keys=True)


def record_sha256(record: Mapping | list) -> str:
    """The sha256 of `record_text` in hex: equal for equal records."""
    return hashlib.sha256(record_text(record).encode()).hexdigest()
