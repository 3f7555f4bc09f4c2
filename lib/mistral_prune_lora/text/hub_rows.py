"""Rows of datasets with all of their columns: of the Hub, of local files, of the known texts, whole or as a stream."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from mistral_prune_lora.errors import DataError, PipelineError
from mistral_prune_lora.hub import dataset_error, open_dataset
from mistral_prune_lora.text.columns import columns_of
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.rows import missing_column, read_records
from mistral_prune_lora.text.saved import is_saved_dataset, saved_columns, saved_table
from mistral_prune_lora.text.sources import DATASETS, load_documents
from mistral_prune_lora.text.splits import describe_files, split_files, split_names, split_pieces
from mistral_prune_lora.text.squad_json import flat_rows

_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Rows:
    """The rows that a dataset's split stands for.

    Attributes:
        name: the dataset's name, without its place.
        source: where they come from; for every local file, its name and sha256; for the Hub, the commit.
        count: how many there are; None for a stream, of which nobody knows.
        rows: each with its columns by name; to be gone through once.
        separator: what joins texts to a running one.
    """

    name: str
    source: str
    count: int | None
    rows: Iterable[Mapping] = field(repr=False)
    separator: str = "\n\n"


def open_rows(spec: DatasetSpec) -> Rows:
    """Find the rows of a dataset.

    Raises:
        DataError: the dataset contradicts itself, is not there, or cannot be read; the Hub cannot be reached. Rows are
            read as they are asked for, and may raise it too.
    """
    spec.check()
    if spec.is_on_hub:
        return _of_hub(spec)
    if spec.text_files or spec.dataset in DATASETS:
        return _of_known_text(spec)
    path = Path(spec.dataset or "")
    if not spec.dataset or not path.exists():
        raise DataError(
            f"unknown dataset {spec.dataset!r}, and no file or folder of that name",
            where="dataset",
            mend=f"name a file, a folder, one of {', '.join(DATASETS)}, or a dataset on the Hub as owner/name",
        )
    if is_saved_dataset(path):
        return _of_saved(spec, path)
    return _streamed_files(spec, path) if spec.streaming else _of_files(spec, path)


def check_columns(spec: DatasetSpec) -> None:
    """Raise a DataError if local files lack a column that is needed, by their headers and first rows alone.

    What is on the Hub is not asked, nor what a file's beginning does not say.
    """
    if spec.is_on_hub or spec.text_files or spec.dataset in DATASETS:
        return
    path, name = Path(spec.dataset or ""), split_names(spec.split)[0]
    there = saved_columns(path, name) if is_saved_dataset(path) else columns_of(split_files(path, name)[0])
    if there is None or {"data", "paragraphs"} & set(there):
        return
    for column in spec.needed:
        if column not in there:
            raise missing_column(path, column, there)


def _of_hub(spec: DatasetSpec) -> Rows:
    repo_id, revision = str(spec.dataset), str(spec.revision)
    builder = open_dataset(repo_id, revision=revision, config=spec.config, kind=DataError)
    config = f" ({builder.config.name})" if spec.config else ""
    name, source = repo_id.split("/")[1], f"{repo_id}@{revision}{config}: {spec.split}"
    try:
        if spec.streaming:
            stream = builder.as_streaming_dataset(split=spec.split)
            return Rows(name, source, None, _told_of(iter(stream), repo_id, revision))
        builder.download_and_prepare()
        table = builder.as_dataset(split=spec.split)
    except PipelineError:
        raise
    except Exception as error:  # of the library, of its HTTP client, of pyarrow
        raise dataset_error(error, repo_id, revision, DataError) from error
    return Rows(name, source, len(table), table)


def _told_of(rows: Iterator[Mapping], repo_id: str, revision: str) -> Iterator[Mapping]:
    """The rows of a stream, its errors in one line."""
    try:
        yield from rows
    except PipelineError:
        raise
    except Exception as error:
        raise dataset_error(error, repo_id, revision, DataError) from error


def _of_known_text(spec: DatasetSpec) -> Rows:
    """Benchmarks, the built-in text and files of text: rows with one column, by the name that is asked for."""
    held, sources, name, separator = {}, [], "", ""
    for split in dict.fromkeys(split_names(spec.split)):
        documents = load_documents(
            spec.dataset, split=split, mirror=spec.mirror, text_files=spec.text_files, column=spec.column
        )
        held[split] = [{spec.column: row} for row in documents.rows]
        sources.append(documents.source)
        name, separator = documents.name, documents.separator
    return replace(_taken(spec.split, name, sources, held), separator=separator)


def _of_saved(spec: DatasetSpec, path: Path) -> Rows:
    held, sources = {}, []
    for split in dict.fromkeys(split_names(spec.split)):
        held[split], source = saved_table(path, split)
        sources.append(source)
    return _taken(spec.split, path.name, sources, held)


def _of_files(spec: DatasetSpec, path: Path) -> Rows:
    held, sources = {}, []
    for split in dict.fromkeys(split_names(spec.split)):
        files = split_files(path, split)
        held[split] = [row for file in files for record in read_records(file) for row in flat_rows(record)]
        sources.append(describe_files(files))
    return _taken(spec.split, _stem(path), sources, held)


def _taken(expression: str, name: str, sources: Iterable[str], held: Mapping[str, Sequence[Mapping]]) -> Rows:
    """The rows that a split expression takes of whole splits."""
    pieces = split_pieces(expression, {split: len(rows) for split, rows in held.items()})
    parts = [_cut(held[split], first, end) for split, first, end in pieces]
    source = ", ".join(dict.fromkeys(sources))
    return Rows(name, f"{source}: {expression}", sum(len(part) for part in parts), chain.from_iterable(parts))


def _cut(rows: Sequence[Mapping], first: int, end: int) -> Sequence[Mapping]:
    """Some rows; of a dataset on disk, without reading them."""
    return rows.select(range(first, end)) if hasattr(rows, "select") else rows[first:end]


def _streamed_files(spec: DatasetSpec, path: Path) -> Rows:
    """The rows of local files, by the dataset library, which reads no further than it is asked."""
    files = split_files(path, spec.split)
    rows = chain.from_iterable(_stream(file) for file in files)
    return Rows(_stem(path), f"{describe_files(files)}: {spec.split}", None, rows)


def _stream(file: Path) -> Iterator[Mapping]:
    import datasets

    kind = _KINDS[Path(file.name.lower().removesuffix(".gz")).suffix]
    options: dict = {"sample_by": "document"} if kind == "text" else {}
    if kind == "csv":  # texts as they stand: a number in one row says nothing of the next
        columns = columns_of(file) or []
        options = {
            "features": datasets.Features({column: datasets.Value("string") for column in columns}),
            "keep_default_na": False,
        }
    with _wording(file):
        stream = datasets.load_dataset(kind, data_files=[os.fspath(file)], split="train", streaming=True, **options)
        for row in stream:
            yield from flat_rows(row)


@contextmanager
def _wording(file: Path) -> Iterator[None]:
    """The errors of the dataset library in one line."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        first = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot be read: {first}", where=file, mend="mend the file, or fetch it again") from error


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or path.name
