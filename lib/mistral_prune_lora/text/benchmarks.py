"""WikiText-2, C4 and PTB as perplexity papers use them: which files, which rows, how they are joined.

One reader for both ways: a Hub file is downloaded (at a pinned revision) and then read exactly as a mirror's is. The
dataset library is left out on purpose: offline it looks its cache up by folder name and can serve another dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.hub import fetch_dataset_file
from mistral_prune_lora.text.rows import read_lines, read_rows
from mistral_prune_lora.text.splits import describe_files, missing_split, split_named


@dataclass(frozen=True)
class Benchmark:
    """One published dataset.

    Attributes:
        repo_id, revision: the dataset repository on the Hub.
        folder: the folder of the configuration in it.
        files: for each split, the file's path below `folder`.
        column: the column that holds the text.
        separator: what joins the rows.
        raw_files: for each split, the name of the plain text file the dataset was first published as.
        row_limit: for each split, how many rows are read; all of them where none is given.
        test_windows: how many windows its evaluation looks at; None means all.
    """

    repo_id: str
    revision: str
    folder: str
    files: Mapping[str, str]
    column: str
    separator: str
    raw_files: Mapping[str, str]
    row_limit: Mapping[str, int]
    test_windows: int | None = None

    def windows(self, split: str) -> int | None:
        """How many windows an evaluation on this split looks at; None means all."""
        return None if split == "train" else self.test_windows


BENCHMARKS: Mapping[str, Benchmark] = {
    "wikitext2": Benchmark(
        repo_id="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        folder="wikitext-2-raw-v1",
        files={split: f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")},
        column="text",
        separator="\n\n",
        raw_files={"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"},
        row_limit={},
    ),
    "c4": Benchmark(
        repo_id="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        folder="en",
        files={
            "train": "c4-train.00000-of-01024.json.gz",
            "validation": "c4-validation.00000-of-00008.json.gz",
            "test": "c4-validation.00000-of-00008.json.gz",
        },
        column="text",
        separator=" ",
        raw_files={},
        # The files are shuffled, so the first documents are a sample. A whole training file would be 0.8 GB of text.
        row_limit={"train": 20_000, "validation": 1100, "test": 1100},
        test_windows=256,
    ),
    "ptb": Benchmark(
        repo_id="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        folder="penn_treebank",
        files={split: f"{split}/0000.parquet" for split in ("train", "validation", "test")},
        column="sentence",
        separator=" ",
        raw_files={"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"},
        row_limit={},
    ),
}


def benchmark_rows(name: str, split: str, mirror: str | Path | None) -> tuple[list[str], str]:
    """The rows of one split of a benchmark and where they came from.

    Args:
        name: a key of BENCHMARKS.
        split: "train", "validation" or "test".
        mirror: local copy of the repository, of the folder of its configuration, or of a single file; None: the Hub.

    Raises:
        DataError: the mirror lacks the split or is malformed; the Hub cannot be reached.
    """
    benchmark = BENCHMARKS[name]
    if mirror is None:
        path = _download(name, benchmark, split)
        origin = f"{benchmark.repo_id}@{benchmark.revision}/{benchmark.folder}"
    else:
        path = find_in_mirror(name, split, mirror)
        origin = "mirror"
    limit = benchmark.row_limit.get(split)
    if path.name in benchmark.raw_files.values():
        rows = _raw_rows(name, path)[:limit]
    else:
        rows = read_rows(path, benchmark.column, limit=limit)
    return rows, f"{origin}: {describe_files([path])}"


def _raw_rows(name: str, path: Path) -> list[str]:
    """The rows that the published parquet files hold, made from the plain text file."""
    lines = read_lines(path)
    if name == "ptb":
        return [line.strip() for line in lines]
    return [line if line.strip() else "" for line in lines]


def find_in_mirror(name: str, split: str, mirror: str | Path) -> Path:
    """The file of one split of a benchmark in a local copy; arguments and errors as for `benchmark_rows`."""
    benchmark, mirror = BENCHMARKS[name], Path(mirror)
    if mirror.is_file():
        named = split_named(mirror.name) or split_named(mirror.parent.name)
        wanted = split_named(benchmark.files[split])
        if named not in (None, wanted):
            raise missing_split(mirror, split, [named])
        return mirror
    if not mirror.is_dir():
        raise DataError("there is no such mirror", where=mirror, mend=f"give a local copy of {benchmark.repo_id}")
    there = {}
    for known in benchmark.files:
        names = [benchmark.files[known], benchmark.raw_files.get(known)]
        places = [mirror / folder / file for folder in (benchmark.folder, "") for file in names if file]
        found = next((place for place in places if place.is_file()), None)
        if found:
            there[known] = found
    if split in there:
        return there[split]
    if there:
        raise missing_split(mirror, split, there)
    raise DataError(
        f"is no copy of {benchmark.repo_id}: it has no {benchmark.folder}/{benchmark.files[split]}",
        where=mirror,
        mend="give the folder of the repository, of its configuration, or the file itself",
    )


def _download(name: str, benchmark: Benchmark, split: str) -> Path:
    file = f"{benchmark.folder}/{benchmark.files[split]}"
    mend = f"give a local copy of {file} as mirror of {name}, or use the built-in dataset pydoc"
    return fetch_dataset_file(benchmark.repo_id, file, revision=benchmark.revision, kind=DataError, mend=mend)
