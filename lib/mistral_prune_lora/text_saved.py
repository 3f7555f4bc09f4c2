"""Datasets that a user saved with `datasets.save_to_disk`: the one format here that needs that library to be read.

Read from the folder itself, never through the library's cache, which is keyed by names and can serve other data.
"""

from __future__ import annotations

from pathlib import Path

from mistral_prune_lora.digest import file_sha256
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text_rows import missing_split

_SINGLE, _SEVERAL = "state.json", "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`, of one dataset or of several splits."""
    return (path / _SINGLE).is_file() or (path / _SEVERAL).is_file()


def saved_rows(path: Path, split: str, column: str) -> tuple[list[str], str]:
    """The texts of one split of a saved dataset, and its Arrow files with their sha256.

    A folder that holds a single dataset is one split, whichever is asked for.

    Raises:
        DataError: the split or the column is not there (names those that are), or a row is not text.
    """
    import datasets

    folder = path
    if (path / _SEVERAL).is_file():
        splits = sorted(p.name for p in path.iterdir() if (p / _SINGLE).is_file())
        if split not in splits:
            raise missing_split(path, split, splits)
        folder = path / split
    table = datasets.load_from_disk(str(folder))
    if column not in table.column_names:
        raise DataError(
            f"there is no column {column!r}, only {', '.join(table.column_names)}", where=path, mend="name one of those"
        )
    rows = [row for row in table[column] if row is not None]
    if not all(isinstance(row, str) for row in rows):
        raise DataError(f"column {column!r} does not hold text", where=path, mend="name a column of strings")
    files = sorted(folder.glob("*.arrow"))
    return rows, ", ".join(f"{file.name} sha256={file_sha256(file)}" for file in files)
