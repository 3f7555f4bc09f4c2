"""All or nothing on disk: what is written appears whole under its name, or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.errors import PipelineError, printable
from mistral_prune_lora.storage.json_file import MAX_BYTES, parsed
from mistral_prune_lora.storage.plain_file import open_plain
from mistral_prune_lora.storage.scratch import Scratch, leftovers, take

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# What a user can mend by another place, or by room there.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def atomic_directory(target: str | Path, *, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A fresh directory that takes the place of `target` when the block ends without an exception.

    As `atomic_directories`, for a single one.
    """
    with atomic_directories([target], check=check) as (fresh,):
        yield fresh


@contextmanager
def atomic_directories(
    targets: Sequence[str | Path], *, check: Callable[[], None] | None = None
) -> Iterator[tuple[Path, ...]]:
    """Fresh directories beside some targets that take their places when the block ends without an exception.

    That they can is found out before the block is entered: scratch folders are made where they will be needed. A kill
    at any point leaves under each name the old directory or the new one, whole; what a killed run left beside it is
    removed by the next one. All directories are complete on disk before the first is put in place, and so is a note of
    what is to be done: of a run that was killed between two of them, the next one puts the rest in place before it
    begins. Files of a former result do not survive in the new one. Where the file system cannot exchange two
    directories, the old one is out of its place for a moment; the next run puts it back if it has to.

    Args:
        targets: of a link, the directory it leads to is replaced.
        check: called at the end, before anything is replaced; raises a PipelineError if what is there must stay.

    Raises:
        PipelineError: a target cannot be written; or, at the end, not be put in place: then the finished directories
            are kept, nothing is replaced, and the error says where they are.
    """
    with _scratches(targets, directories=True) as scratches:
        yield tuple(scratch.new for scratch in scratches)
        for scratch in scratches:
            _sync_tree(scratch.new)
        _put_all(scratches, check)


@contextmanager
def atomic_file(target: str | Path, *, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A path to write to; fsynced and renamed over `target` when the block ends without an exception.

    Args:
        target: of a link, the file it leads to is replaced.
        check: as for `atomic_directories`.

    Raises:
        PipelineError: as for `atomic_directories`.
    """
    with _scratches([target], directories=False) as (scratch,):
        yield scratch.new
        _sync(scratch.new)
        _put_all([scratch], check)


@contextmanager
def scratch_directory(target: str | Path) -> Iterator[Path]:
    """A directory beside `target` for work on the way to it, removed with all that it holds when the block ends.

    What a killed run left is removed by the next one, and whenever `target` itself is written.
    """
    with _scratches([target], directories=True) as (scratch,):
        yield scratch.new


def check_place(*targets: str | Path, directory: bool = True) -> None:
    """Raise a PipelineError unless directories, or files, can be written and put in place of all these targets.

    Asked by doing it: scratch folders are made and removed, those of killed runs too. To be called before work whose
    result comes much later.
    """
    for target in targets:
        _mend_all(target)
        Scratch.beside(target, directory=directory).discard()


@contextmanager
def _scratches(targets: Sequence[str | Path], *, directories: bool) -> Iterator[list[Scratch]]:
    with ExitStack() as held:
        scratches = []
        for target in targets:
            _mend_all(target)
            scratch = Scratch.beside(target, directory=directories)
            held.callback(scratch.discard)  # after an exchange, the former result
            scratches.append(scratch)
        try:
            yield scratches
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            where = scratches[0].target.parent if len(scratches) > 1 else scratches[0].target
            mend = "make room there, or choose another place; what was there before is untouched"
            raise PipelineError(f"the result cannot be written: {error.strerror}", where=where, mend=mend) from error


@dataclass(frozen=True)
class _Move:
    """One result on its way to its target; inode numbers tell how far it came, whoever looks.

    Attributes:
        scratch: where it was written.
        new: inode of the new result.
        was: inode and time of the last change of what it replaces; None if there was nothing.
    """

    scratch: Scratch
    new: int
    was: list[int] | None

    @classmethod
    def planned(cls, scratch: Scratch) -> _Move:
        """The move that is about to be made."""
        return cls(scratch, scratch.new.stat().st_ino, _state(scratch.target))

    def make(self) -> None:
        """Rename the new result to its target; a former directory then lies at `scratch.new` or `scratch.old`."""
        new, target, old = self.scratch.new, self.scratch.target, self.scratch.old
        if not new.is_dir():
            os.replace(new, target)
        elif not target.exists():
            os.rename(new, target)
        elif not _exchange(new, target):
            os.rename(target, old)
            os.rename(new, target)

    def undo(self) -> None:
        """Take it back as far as it came."""
        new, target, old = self.scratch.new, self.scratch.target, self.scratch.old
        if self.made and (old.exists() or self.was is None):
            os.rename(target, new)
        elif self.made and new.exists():
            _exchange(new, target)
        if old.exists() and not target.exists():
            os.rename(old, target)

    def finish(self) -> None:
        """Make the move if it was not made, and nobody has put anything else or anything more at the target since."""
        if _inode(self.scratch.new) == self.new and _state(self.scratch.target) in (None, self.was):
            self.make()

    @property
    def made(self) -> bool:
        """Whether the new result is in its place."""
        return _inode(self.scratch.target) == self.new


def _put_all(scratches: Sequence[Scratch], check: Callable[[], None] | None) -> None:
    """Put finished results in place, all or none; what cannot be is kept."""
    moves = [_Move.planned(scratch) for scratch in scratches]
    try:
        if check:
            check()
        if len(moves) > 1:
            _write_journals(moves)
        for move in moves:
            move.make()
    except BaseException as error:
        for move in reversed(moves):
            # One that cannot be undone leaves the journal, by which the next run puts the others in place too.
            with suppress(OSError):
                move.undo()
        if isinstance(error, (OSError, PipelineError)):
            raise _kept(moves, error) from error
        raise
    for parent in {scratch.target.parent for scratch in scratches}:
        _sync_directory(parent)


def _kept(moves: Sequence[_Move], error: OSError | PipelineError) -> PipelineError:
    """The error that says where finished results are that could not be put in place."""
    what = error.what if isinstance(error, PipelineError) else error.strerror
    where = error.where if isinstance(error, PipelineError) else moves[0].scratch.target
    named = [f"{m.scratch.keep()} is to become {m.scratch.target}" for m in moves if not m.made]
    for line in named:  # an error of many long paths would be cut
        print(f"kept: {printable(line)}", file=sys.stderr)
    return PipelineError(
        f"the result is finished but cannot be put in place: {what}",
        where=where,
        mend=f"it is kept, and can be moved by hand: {'; '.join(named)}",
    )


def _write_journals(moves: Sequence[_Move]) -> None:
    """Note on disk, beside each result, what is about to be done with all of them."""
    for holder in moves:
        place = holder.scratch.folder.parent  # relative to it: another machine may see the disk under another path
        noted = [
            {
                "folder": os.path.relpath(move.scratch.folder, place),
                "target": os.path.relpath(move.scratch.target, place),
                "new": move.new,
                "was": move.was,
            }
            for move in moves
        ]
        holder.scratch.journal.write_text(json.dumps(noted), encoding="utf-8")
        _sync(holder.scratch.journal)
        _sync_directory(holder.scratch.folder)
        _sync_directory(place)


def _mend_all(target: str | Path) -> None:
    for leftover in leftovers(Path(os.path.realpath(target))):
        _mend(leftover)


def _mend(leftover: Scratch) -> None:
    """Put in place what a killed run was putting in place, or put back what it had taken away; remove the rest."""
    moves = _moves_begun(leftover)
    held = [leftover, *(move.scratch for move in moves or ())]
    try:
        if moves is None:
            if leftover.old.exists() and not leftover.target.exists():
                os.rename(leftover.old, leftover.target)
            leftover.discard()
            return
        # Where one has lost its note, all were in place and were being cleared away; or none was.
        if all(move.scratch.journal.exists() for move in moves):
            for move in moves:
                move.finish()
                _sync_directory(move.scratch.target.parent)
        for move in moves:
            move.scratch.discard()
    except OSError as error:
        told = "is left over from a run that was killed, and what it holds cannot be put in place"
        print(f"{leftover.folder} {told}: {error.strerror}", file=sys.stderr)
    finally:
        for scratch in held:
            scratch.release()


def _moves_begun(leftover: Scratch) -> list[_Move] | None:
    """What a leftover's journal says was to be done, every scratch folder held.

    None without a journal; empty if nothing can be done now, since some of them are held or cannot be seen.
    """
    place, moves = leftover.folder.parent, list[_Move]()
    try:
        if leftover.journal.lstat().st_uid != os.geteuid():
            return []  # another user's word is no reason to move anything
        with open_plain(leftover.journal) as file:
            noted = parsed(file.read(MAX_BYTES).decode("utf-8"))
        named = [[Path(os.path.normpath(place / move[key])) for key in ("folder", "target")] for move in noted]
        inodes = [(move["new"], move["was"]) for move in noted]
    except (OSError, PipelineError, ValueError, KeyError, TypeError):
        return None  # none, or a kill while it was written: nothing had been put in place yet
    scratch: Scratch | None
    for (folder, target), (new, was) in zip(named, inodes, strict=True):
        if folder == leftover.folder:
            scratch = leftover
        elif folder.exists() or not folder.parent.exists():
            scratch = take(folder, target)
        else:
            scratch = Scratch(target, folder, None)  # cleared away already
        if scratch is None:
            for move in moves:
                move.scratch.release()
            return []
        moves.append(_Move(scratch, new, was))
    return moves


def nearest_directory(path: Path) -> Path:
    """A path, or the first of its parents, that is a directory: whose file system something new there would be on."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories in one step, by Linux's renameat2(2); False where system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(second))


def _state(path: Path) -> list[int] | None:
    """Inode and time of the last change of what is at a path; a list, as JSON gives it back."""
    try:
        told = os.lstat(path)
    except OSError:
        return None
    return [told.st_ino, told.st_mtime_ns]


def _inode(path: Path) -> int | None:
    state = _state(path)
    return state[0] if state else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    with suppress(PermissionError):  # a directory may be written to and not read
        _sync(path)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent) / name)
        _sync(Path(parent))
