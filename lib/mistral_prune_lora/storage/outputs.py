"""What a command may write where: one rule for all, asked before the work and again before anything is replaced.

No output is an input, holds one or lies in one, whatever links or mounts lead there; nothing lifts that. What is there
already is replaced if it is this command's own: a directory that holds its record and no file that the record does not
name, or a file that reads as its result. Anything else is replaced only if the user says so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage.json_file import read_json

_LARGEST_RECORD = 64 << 20  # bytes; the record of a merge names every tensor that was out of scope
_DEPTH = 2  # how far into an input's folders its files are looked at; commands read no deeper
_ELSEWHERE = "choose another place: an input is never written to"

Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class Record:
    """How a command knows a directory that it has written: by what one file in it says.

    Attributes:
        name: the file.
        author: what wrote it, for errors: "a merge".
        names: the files that a record's content lists, as paths in the directory, the record among them; None if the
            content is not such a record.
    """

    name: str
    author: str
    names: Callable[[dict], Collection[str] | None]


@dataclass(frozen=True)
class Output:
    """A path that a command writes. Made by `directory`, `file` and `folder`.

    Attributes:
        path: as the user gave it.
        flag: what it was given with, for errors.
        objection: why what is there is not the command's own to replace; None if it is.
        is_directory: whether a directory is written or a file.
        replaced: whether what is there is replaced, or added to.
    """

    path: Path
    flag: str
    objection: Callable[[Path], str | None]
    is_directory: bool
    replaced: bool = True

    @classmethod
    def directory(cls, path: str | Path, flag: str, record: Record) -> Output:
        """A directory that is written whole, and replaces one that `record` knows."""
        return cls(Path(path), flag, lambda there: _not_recorded(there, record), True)

    @classmethod
    def file(cls, path: str | Path, flag: str, is_ours: Callable[[Path], bool], author: str) -> Output:
        """A file that is written whole, and replaces one that `is_ours` says yes to; `author` as in `Record`."""
        told = f"was not written by {author}"
        return cls(Path(path), flag, lambda there: None if is_ours(there) else told, False)

    @classmethod
    def folder(cls, path: str | Path, flag: str) -> Output:
        """A directory that files are added to under names of their own; what is there stays."""
        return cls(Path(path), flag, lambda there: None, True, replaced=False)


def claim(
    outputs: Sequence[Output], inputs: Iterable[str | Path | None], *, overwrite: bool = False
) -> Callable[[], None]:
    """Raise a PipelineError unless a command may write its outputs; returns a function that asks the same again.

    Args:
        outputs: all that the command writes.
        inputs: all that it reads: files and directories. What names nothing, and what is not there (a Hub id, say), is
            passed over.
        overwrite: replace what the command has not written, too; never an input.
    """
    read = [Path(path) for path in inputs if path]

    def check() -> None:
        known = [_Input.of(path) for path in read if os.path.exists(path)]
        for number, output in enumerate(outputs):
            _refuse_kind(output)
            for given in known:
                _refuse_input(output, given)
            for other in outputs[:number]:
                _refuse_each_other(output, other)
            _refuse_place(output)
            if not overwrite:
                _refuse_foreign(output)

    check()
    return check


def read_record(path: Path) -> dict:
    """The object in a small JSON file; {} if it is anything else, whatever it is."""
    try:
        told = path.lstat()
        if not stat.S_ISREG(told.st_mode) or told.st_size > _LARGEST_RECORD:
            return {}
        return read_json(path, max_bytes=_LARGEST_RECORD)
    except (OSError, PipelineError):
        return {}


def listed_files(folder: Path) -> list[str]:
    """All files in a directory, as paths in it, sorted: what a record lists."""
    return sorted(os.path.relpath(os.path.join(parent, name), folder) for parent, name in _walk(folder))


@dataclass(frozen=True)
class _Input:
    """An input as the file system knows it.

    Attributes:
        path: as given.
        own: itself and what lies in it.
        behind: what links in it lead to.
        above: the directories that hold it, or what links in it lead to.
    """

    path: Path
    own: set[Identity] = field(default_factory=set)
    behind: set[Identity] = field(default_factory=set)
    above: set[Identity] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path) -> _Input:
        found = cls(path)
        itself, *parents = _chain(path)
        found.own.add(itself)
        found.above.update(parents)
        found._look_into(path, _DEPTH)
        return found

    def _look_into(self, folder: str | Path, depth: int) -> None:
        try:
            there = [entry.path for entry in os.scandir(folder)] if depth else []
        except OSError:
            return  # a file, or what may not be read
        for path in there:
            if not os.path.exists(path):
                continue  # a link to nothing, or another run's scratch folder that is gone already
            if os.path.islink(path):
                # In a Hub cache every file of a model is a link.
                itself, *parents = _chain(Path(path))
                self.behind.add(itself)
                self.above.update(parents)
            else:
                self.own.update(_identities([path]))
                self._look_into(path, depth - 1)


def _refuse_kind(output: Output) -> None:
    """Raise if something of another kind is there, which a rename would not replace, or should not."""
    try:
        mode = output.path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        told = f"cannot be written: {error.strerror}"
        raise PipelineError(told, where=_where(output), mend="choose another place") from None
    if output.is_directory and not stat.S_ISDIR(mode):
        raise PipelineError("is a file, not a directory", where=_where(output), mend="choose another place")
    if not output.is_directory and stat.S_ISDIR(mode):
        raise PipelineError("is a directory, not a file", where=_where(output), mend="name a file")
    if not output.is_directory and not stat.S_ISREG(mode):
        raise PipelineError("is a device or a pipe, not a file", where=_where(output), mend="name a file")


def _refuse_input(output: Output, given: _Input) -> None:
    there = os.path.exists(output.path)
    chain = _chain(output.path)
    if there and chain[0] in given.own | given.behind:
        raise PipelineError(f"is an input, or a part of one: {given.path}", where=_where(output), mend=_ELSEWHERE)
    if there and chain[0] in given.above:
        raise PipelineError(f"holds an input, {given.path}", where=_where(output), mend=_ELSEWHERE)
    if given.own.intersection(chain):
        raise PipelineError(f"lies in an input, {given.path}", where=_where(output), mend=_ELSEWHERE)


def _refuse_each_other(first: Output, second: Output) -> None:
    """Raise if two outputs are one, or one lies in the other, which would take it along when it is replaced."""
    a, b = Path(os.path.realpath(first.path)), Path(os.path.realpath(second.path))
    if a == b or (first.replaced and _holds(a, b)) or (second.replaced and _holds(b, a)):
        raise PipelineError(
            f"{first.path} and {second.path} lie in one another",
            where=f"{first.flag}, {second.flag}",
            mend="give each output a place of its own",
        )


def _holds(outer: Path, inner: Path) -> bool:
    return outer in inner.parents or any(itself in _chain(inner) for itself in _identities([outer]))


def _refuse_place(output: Output) -> None:
    """Raise if replacing a directory would take away the one that the user is in, or the user's home."""
    if not (output.is_directory and output.replaced and os.path.exists(output.path)):
        return
    itself = _chain(output.path)[0]
    for place, name in ((".", "the directory that you are in"), (os.path.expanduser("~"), "your home directory")):
        if itself in _chain(Path(place)):
            raise PipelineError(f"is or holds {name}", where=_where(output), mend="choose another place")


def _refuse_foreign(output: Output) -> None:
    if not os.path.exists(output.path):
        return
    try:
        objection = output.objection(output.path)
    except OSError as error:
        objection = f"cannot be read: {error.strerror}"
    if objection:
        mend = "choose another place, or give --overwrite if what is there may be lost"
        raise PipelineError(objection, where=_where(output), mend=mend)


def _not_recorded(folder: Path, record: Record) -> str | None:
    """Why a directory may not be replaced: it is not empty, and the record is missing or does not name all files."""
    names = record.names(read_record(folder / record.name))
    if names is None:
        there = sorted(os.listdir(folder))
        return f"holds no record of {record.author} ({record.name}), but {_shortened(there)}" if there else None
    strangers = sorted(set(listed_files(folder)) - set(names))
    return f"holds files that its {record.name} does not name: {_shortened(strangers)}" if strangers else None


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    for parent, folders, files in os.walk(folder):
        yield from ((parent, name) for name in files)
        yield from ((parent, name) for name in folders if os.path.islink(os.path.join(parent, name)))


def _where(output: Output) -> str:
    return f"{output.flag} {output.path}"


def _chain(path: Path) -> list[Identity]:
    """The identities of a path, if it is there, and of its parents, from the inside out; through links."""
    real = Path(os.path.realpath(path))
    return _identities((real, *real.parents))


def _identities(paths: Iterable[str | Path]) -> list[Identity]:
    """Of those that are there and can be asked."""
    found = []
    for path in paths:
        with suppress(OSError):
            told = os.stat(path)
            found.append((told.st_dev, told.st_ino))
    return found
