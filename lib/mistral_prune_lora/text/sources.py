"""Where text comes from: published benchmarks, the built-in corpus, files of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.benchmarks import BENCHMARKS, benchmark_rows
from mistral_prune_lora.text.pydoc import pydoc_paragraphs, pydoc_source
from mistral_prune_lora.text.rows import read_rows, read_text
from mistral_prune_lora.text.saved import is_saved_dataset, saved_rows
from mistral_prune_lora.text.splits import describe_files, split_files

SPLITS = ("train", "validation", "test")
DATASETS = (*BENCHMARKS, "pydoc")
_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Text:
    """One text to be tokenised at once.

    Attributes:
        name: the dataset's name, or the stem of the user's file (several joined with "+").
        split: the split asked for; a file of the user's own is what it is, whatever this says.
        text: the text.
        sha256: of its UTF-8 bytes.
        source: where it came from; for every file read, its name and sha256.
        max_windows: how many windows the dataset's evaluation protocol looks at; None means all of them.
    """

    name: str
    split: str
    text: str = field(repr=False)
    sha256: str
    source: str
    max_windows: int | None = None


def load_text(
    dataset: str | None = None,
    *,
    split: str = "test",
    mirror: str | Path | None = None,
    text_files: Sequence[str | Path] = (),
    column: str = "text",
) -> Text:
    """Load a text to evaluate or train on.

    Args:
        dataset: "wikitext2", "c4", "ptb" (from the Hub or a mirror), "pydoc" (built in, needs no network), or the path
            of a user's dataset: a parquet, json, jsonl, jsonl.gz, csv or txt file, a folder of such files, or what
            `datasets.save_to_disk` wrote. Files
            in a folder that carry a split's name are chosen by it; a folder without such names is one split.
        split: "train", "validation" or "test". c4 has no test split; its validation file stands for both.
        mirror: local copy of a benchmark's repository, of the folder of its configuration, or of a single file.
        text_files: UTF-8 text files, joined with a blank line; `dataset` is not looked at if they are given.
        column: the column (or JSON key) of a user's dataset that holds the text.

    Raises:
        DataError: an unknown dataset, a missing split, column or file, text that is empty or not UTF-8, or no network.
    """
    documents = load_documents(dataset, split=split, mirror=mirror, text_files=text_files, column=column)
    text = documents.joined()
    limit = BENCHMARKS[documents.name].windows(split) if documents.name in BENCHMARKS else None
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return Text(documents.name, split, text, digest, documents.source, limit)


@dataclass(frozen=True)
class Documents:
    """The rows that a text is joined from.

    Attributes:
        name: as in Text.
        rows: documents, paragraphs or sentences, in the order of the source.
        separator: what joins them.
        source: as in Text.
    """

    name: str
    rows: list[str] = field(repr=False)
    separator: str
    source: str

    def joined(self) -> str:
        """All rows as one text.

        Raises:
            DataError: there is nothing but white space in it.
        """
        text = self.separator.join(self.rows)
        if not text.strip():
            raise DataError("the text is empty", where=self.source, mend="give a text with something in it")
        return text


def load_documents(
    dataset: str | None = None,
    *,
    split: str = "test",
    mirror: str | Path | None = None,
    text_files: Sequence[str | Path] = (),
    column: str = "text",
) -> Documents:
    """The rows of a text before they are joined; arguments and errors as for `load_text`."""
    check_request(dataset, split=split, mirror=mirror, text_files=text_files)
    if text_files:
        paths = [Path(path) for path in text_files]
        rows = [read_text(path) for path in paths]
        return Documents("+".join(path.stem for path in paths), rows, _PARAGRAPH, describe_files(paths))
    name = dataset or ""  # it is given, or would have been refused
    if name in BENCHMARKS:
        rows, source = benchmark_rows(name, split, mirror)
        return Documents(name, rows, BENCHMARKS[name].separator, source)
    if name == "pydoc":
        return Documents("pydoc", pydoc_paragraphs(split), _PARAGRAPH, pydoc_source())
    path = Path(name)
    if is_saved_dataset(path):
        rows, source = saved_rows(path, split, column)
        return Documents(path.name, rows, _PARAGRAPH, source)
    files = split_files(path, split)
    rows = [row for file in files for row in read_rows(file, column)]
    return Documents(path.name.split(".")[0] or path.name, rows, _PARAGRAPH, describe_files(files))


def check_request(
    dataset: str | None, *, split: str, mirror: str | Path | None, text_files: Sequence[str | Path]
) -> None:
    """Raise a DataError if what is asked for is no text: an unknown dataset or split, a mirror of nothing.

    Arguments as for `load_text`; no file is opened.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}", where="--split", mend=f"use one of {', '.join(SPLITS)}")
    if mirror is not None and (text_files or dataset not in BENCHMARKS):
        raise DataError(
            "a mirror is a local copy of a benchmark, and no benchmark is asked for",
            where=mirror,
            mend=f"use it with one of {', '.join(BENCHMARKS)}, or leave it out",
        )
    if text_files:
        return
    if dataset is None:
        raise DataError("neither a dataset nor a text file is given", mend=f"use one of {', '.join(DATASETS)}")
    if dataset not in DATASETS and not Path(dataset).exists():
        raise DataError(
            f"unknown dataset {dataset!r}, and no file or folder of that name",
            where="--dataset",
            mend=f"use one of {', '.join(DATASETS)}, or the path of a parquet, json, jsonl, csv or txt file",
        )
