"""Which files, and which rows, a split stands for: names of files that speak of one, and expressions with brackets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.plain_file import check_plain
from mistral_prune_lora.text.rows import FORMATS

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_PIECE = re.compile(r"(\w+(?:[.-]\w+)*)(\[(?:-?\d+%?)?:(?:-?\d+%?)?\])?")


def split_files(path: Path, split: str) -> list[Path]:
    """The files of one split: `path` itself if it is a file, else those of a folder whose names say so.

    A folder in which no name speaks of a split is one split, whichever is asked for.

    Raises:
        DataError: nothing to read in the folder, or other splits only (names them).
    """
    if not path.is_dir():
        check_plain(path, DataError, mend="give a file or a folder")
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(FORMATS))
    if not files:
        raise DataError("there is no file to read", where=path, mend=f"put one of {', '.join(FORMATS)} there")
    named = {file: split_named(file.name) for file in files}
    if not any(named.values()):
        return files
    chosen = [file for file in files if named[file] == split]
    if not chosen:
        raise missing_split(path, split, {name for name in named.values() if name})
    return chosen


def split_named(name: str) -> str | None:
    """The split that a file name speaks of ("c4-validation.00000-of-00008.json.gz": "validation"), or None."""
    found = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def missing_split(where: Path, split: str, there: Iterable[str]) -> DataError:
    """The error for a split that is not there, naming those that are."""
    return DataError(
        f"there is no {split} split, only {', '.join(sorted(there))}",
        where=where,
        mend="ask for one of those, or add it",
    )


def describe_files(paths: Sequence[Path]) -> str:
    """File names with their sha256, for provenance."""
    return ", ".join(f"{path.name} sha256={file_sha256(path)}" for path in paths)


def split_names(expression: str) -> list[str]:
    """The splits that an expression takes rows of: `train[:80%]+validation` those of train and validation.

    Raises:
        DataError: it is no such expression.
    """
    pieces = [_PIECE.fullmatch(piece.strip()) for piece in expression.split("+")]
    if not all(pieces):
        raise DataError(
            f"{expression!r} names no split",
            where="split",
            mend="write train, train[:5000], train[10%:] or a+b of such",
        )
    return [piece[1] for piece in pieces if piece]


def is_sliced(expression: str) -> bool:
    """Whether an expression asks for more, or for less, than one whole split."""
    return "[" in expression or "+" in expression


def split_pieces(expression: str, counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The rows that an expression takes, by the rules of the dataset library: (split, first, behind the last) a piece.

    Args:
        expression: as for `split_names`.
        counts: how many rows each split has.

    Raises:
        DataError: it is no such expression, or asks for rows that are not there.
    """
    names = split_names(expression)
    if not is_sliced(expression):
        return [(names[0], 0, counts[names[0]])]
    import datasets

    try:
        taken = datasets.ReadInstruction.from_spec(expression).to_absolute(dict(counts))
    except (ValueError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        told = f"{expression!r} takes no rows: {first}"
        raise DataError(told, where="split", mend="ask for rows that are there") from None
    ends = [(counts[piece.splitname] if piece.to is None else piece.to) for piece in taken]
    return [(piece.splitname, piece.from_ or 0, end) for piece, end in zip(taken, ends, strict=True)]
