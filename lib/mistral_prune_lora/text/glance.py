"""What can be known of a text before it is read: that it is there, of a known format, and not empty. Imports no torch.

A small text is read whole, of a large one the headers alone; of one on the Hub, nothing is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.storage.plain_file import check_plain
from mistral_prune_lora.text.benchmarks import BENCHMARKS, find_in_mirror
from mistral_prune_lora.text.columns import check_column
from mistral_prune_lora.text.saved import check_saved, is_saved_dataset
from mistral_prune_lora.text.sources import check_request, load_documents
from mistral_prune_lora.text.splits import split_files

SMALL = 1 << 20  # bytes of files that are read whole


def glance_at(
    dataset: str | None = None,
    *,
    split: str = "test",
    mirror: str | Path | None = None,
    text_files: Sequence[str | Path] = (),
    column: str = "text",
) -> int | None:
    """Look at a text's files.

    Arguments as for `sources.load_text`.

    Returns:
        The text's length in bytes of UTF-8; None where it was not read.

    Raises:
        DataError: what `load_text` would raise, as far as it can be seen.
    """
    check_request(dataset, split=split, mirror=mirror, text_files=text_files)
    files, checked = _files(dataset, split, mirror, text_files, column)
    if not files:
        return None
    for file in files:
        check_plain(file, DataError)
    if all(not file.name.endswith(".gz") for file in files) and sum(file.stat().st_size for file in files) <= SMALL:
        documents = load_documents(dataset, split=split, mirror=mirror, text_files=text_files, column=column)
        return len(documents.joined().encode())
    for file in files:
        if checked is not None:
            check_column(file, checked)
    return None


def _files(
    dataset: str | None, split: str, mirror: str | Path | None, text_files: Sequence[str | Path], column: str
) -> tuple[list[Path], str | None]:
    """(the files that rows are read from, none where others read them; the column to look for, None for plain text)."""
    if text_files:
        return [Path(path) for path in text_files], None
    name = dataset or ""  # it is given, or would have been refused
    if name in BENCHMARKS:
        if mirror is None:
            return [], None
        file, benchmark = find_in_mirror(name, split, mirror), BENCHMARKS[name]
        return [file], None if file.name in benchmark.raw_files.values() else benchmark.column
    if name == "pydoc":
        return [], None
    path = Path(name)
    if is_saved_dataset(path):
        check_saved(path, split, column)
        return [], None
    return split_files(path, split), column
