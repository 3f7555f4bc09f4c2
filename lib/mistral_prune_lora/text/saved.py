"""Datasets that a user saved with `datasets.save_to_disk`: the one format here that needs that library to be read.

Read from the folder itself, never through the library's cache, which is keyed by names and can serve other data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.json_file import read_json, read_json_if_there
from mistral_prune_lora.storage.plain_file import check_plain, lies_there
from mistral_prune_lora.text.rows import MAX_TEXT_BYTES
from mistral_prune_lora.text.splits import missing_split

if TYPE_CHECKING:
    import datasets

_SINGLE, _SEVERAL = "state.json", "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`, of one dataset or of several splits."""
    return lies_there(path / _SINGLE) or lies_there(path / _SEVERAL)


def saved_rows(path: Path, split: str, column: str) -> tuple[list[str], str]:
    """The texts of one split of a saved dataset, and its Arrow files with their sha256.

    A folder that holds a single dataset is one split, whichever is asked for.

    Raises:
        DataError: the split or the column is not there (names those that are), a row is not text, or the files are
            malformed or too large.
    """
    table, source = saved_table(path, split)
    if column not in table.column_names:
        raise _missing_column(path, column, table.column_names)
    if table.data.nbytes > MAX_TEXT_BYTES:
        raise DataError(
            f"holds more than {MAX_TEXT_BYTES >> 20} MiB, the most that is read here", where=path, mend="save a part"
        )
    rows = [row for row in table[column] if row is not None]
    if not all(isinstance(row, str) for row in rows):
        raise DataError(f"column {column!r} does not hold text", where=path, mend="name a column of strings")
    return rows, source


def saved_table(path: Path, split: str) -> tuple[datasets.Dataset, str]:
    """One split of a saved dataset, checked and left on disk, and its Arrow files with their sha256.

    A folder that holds a single dataset is one split, whichever is asked for.

    Raises:
        DataError: the split is not there (names those that are), or the files are malformed.
    """
    import datasets

    folder = _split_folder(path, split)
    try:
        table = datasets.load_from_disk(str(folder))
        table.data.validate(full=True)  # else a damaged offset is followed, to wherever it leads
    except Exception as error:  # whatever a malformed file provokes in that library and in pyarrow
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot be read as a saved dataset: {first}", where=folder, mend="save it again") from None
    files = sorted(folder.glob("*.arrow"))
    return table, ", ".join(f"{file.name} sha256={file_sha256(file)}" for file in files)


def saved_columns(path: Path, split: str) -> list[str] | None:
    """The columns of one split by the small files alone; None if they do not say.

    Raises:
        DataError: the split is not there, or its files are not.
    """
    folder = _split_folder(path, split)
    features = (read_json_if_there(folder / "dataset_info.json", DataError) or {}).get("features")
    return list(features) if isinstance(features, dict) else None


def check_saved(path: Path, split: str, column: str) -> None:
    """Raise a DataError for what `saved_rows` would find wrong before it reads a row, by the small files alone."""
    there = saved_columns(path, split)
    if there is not None and column not in there:
        raise _missing_column(path, column, there)


def _split_folder(path: Path, split: str) -> Path:
    """The folder of one split, whose files are there."""
    folder = path
    if lies_there(path / _SEVERAL):
        splits = sorted(p.name for p in path.iterdir() if lies_there(p / _SINGLE))
        if split not in splits:
            raise missing_split(path, split, splits)
        folder = path / split
    _check_files(folder)
    return folder


def _missing_column(path: Path, column: str, there: list[str]) -> DataError:
    return DataError(f"there is no column {column!r}, only {', '.join(there)}", where=path, mend="name one of those")


def _check_files(folder: Path) -> None:
    """Raise a DataError for what the library would wait for, or would open elsewhere."""
    mend = "save it again"
    read_json_if_there(folder / "dataset_info.json", DataError)
    named = read_json(folder / _SINGLE, DataError, mend=mend).get("_data_files")
    if not isinstance(named, list) or not all(isinstance(file, dict) for file in named):
        raise DataError("_data_files is no list of files", where=folder / _SINGLE, mend=mend)
    for name in (file.get("filename") for file in named):
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"names {name!r}, which is not a file beside it", where=folder / _SINGLE, mend=mend)
        check_plain(folder / name, DataError, mend=mend)
