"""Scratch folders: where a result is written, beside its target, until it is whole.

`.NAME.new-xxxxxxxx` holds a file `lock`, and in `new` the result under its own name. Whoever writes there holds a lock
(flock) on `lock` until the end, so whether a folder is a leftover is asked of the kernel. A process number would not
tell: a container sees other numbers than its neighbour on the same disk. A folder is held by whoever locks its `lock`
first, whether the one who made it or one who sweeps; the other then finds it gone and makes another.

On NFS, locks reach other machines too, unless it is mounted with local locks (local_lock=flock or all): then let no two
machines write the same output. Where a file system has no locks at all, a leftover is named and never removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mistral_prune_lora.errors import PipelineError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LONGEST_STEM = 120  # bytes of a target's name in that of its scratch folder; some file systems allow 143 in all
_MEMBERS = {"lock", "new", "old", "journal", "kept"}
_ATTEMPTS = 20
_PLACE = "choose a place that can be written to"


class NoLocks(Exception):
    """The file system cannot lock files."""


class Scratch:
    """A folder beside a target that this process holds.

    Attributes:
        target: what the result replaces, an absolute path without links.
        folder: the scratch folder.
        new: the result while it is written; it has the target's name, since writers choose a format by it.
        old: where a former result lies while two renames take the place of one exchange.
        journal: where a transaction over several targets notes what it will do.
    """

    def __init__(self, target: Path, folder: Path, lock: int | None, parents: tuple[Path, ...] = ()) -> None:
        self.target, self.folder, self._lock, self._parents = target, folder, lock, parents
        self.new, self.old, self.journal = folder / "new" / target.name, folder / "old", folder / "journal"
        self._kept = False

    @classmethod
    def beside(cls, target: str | Path, *, directory: bool) -> Scratch:
        """Make one, with an empty directory or file at `new`; what shows here could not be written is told at once.

        Args:
            target: of a link, what it leads to.
            directory: whether a directory will be put there, or a file.

        Raises:
            PipelineError: nothing can be put in place of `target`: no permission, no such place, a name that the file
                system does not take, a read-only or full disk, a mount point.
        """
        target = Path(os.path.realpath(target))
        try:
            _refuse_what_cannot_be_moved(target)
            scratch = _make(target)
        except OSError as error:
            raise PipelineError(f"cannot be written: {error.strerror}", where=target, mend=_PLACE) from error
        try:
            os.mkdir(scratch.folder / "new")
            if directory:
                os.mkdir(scratch.new)
            else:
                os.close(os.open(scratch.new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except OSError as error:
            scratch.discard()
            raise PipelineError(f"cannot be written: {error.strerror}", where=target, mend=_PLACE) from error
        return scratch

    def keep(self) -> str:
        """Save the finished result from every later sweep, and say where it is: beside the target, if that can be."""
        suffix = "" if self.new.is_dir() else self.target.suffix
        visible = self.target.with_name(f"{_stem(self.target.name)}.finished-{self.folder.name[-8:]}{suffix}")
        try:
            os.rename(self.new, visible)
        except OSError:
            self._kept = True
        else:
            return str(visible)
        try:
            # Where the parent has become read-only, this folder is still ours to write to.
            (self.folder / "kept").touch()
        except OSError:
            return f"{self.new} (until the next run)"
        return str(self.new)

    def discard(self) -> None:
        """Remove the folder and all in it, and the parents that were made for it if they are empty; let go of it."""
        if not self._kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.release()
        # The folder once more: NFS lets go of a file that was open, the lock, when it is closed.
        _remove_empty((*self._parents, self.folder))

    def release(self) -> None:
        """Let go of the folder and leave it where it is."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def leftovers(target: Path) -> Iterator[Scratch]:
    """The scratch folders of a target that nobody holds any more; from here on this process does.

    What older versions of this library left, which had no locks, is removed or put back here.
    """
    stem = re.escape(f".{_stem(target.name)}.")
    ours, former = re.compile(stem + r"new-[a-z0-9_]{8}"), re.compile(stem + r"(new|old)-\d+-.*")
    try:
        there = sorted(target.parent.iterdir())
    except OSError:
        return
    for path in there:
        if match := former.fullmatch(path.name):
            _remove_former(path, target if match[1] == "old" else None)
        elif ours.fullmatch(path.name) and (scratch := take(path, target)):
            yield scratch


def take(folder: Path, target: Path) -> Scratch | None:
    """A scratch folder that is there, held; None if it is gone, is somebody's work, or cannot be asked."""
    try:
        if folder.is_symlink() or not set(os.listdir(folder)) <= _MEMBERS:
            return None
        lock = _take_lock(folder)
    except NoLocks:
        told = "may be left over from a run that was killed; its file system has no locks that would tell"
        print(f"{folder} {told}. Delete it if no other run writes {target}.", file=sys.stderr)
        return None
    except OSError:
        return None
    if lock is None:
        return None
    scratch = Scratch(target, folder, lock)
    if (folder / "kept").exists():
        scratch.release()
        return None
    return scratch


def _make(target: Path) -> Scratch:
    parents = tuple(parent for parent in target.parents if not os.path.exists(parent))[::-1]
    try:
        for _ in range(_ATTEMPTS):
            if scratch := _attempt(target, parents):
                return scratch
    except OSError:
        _remove_empty(parents)
        raise
    raise PipelineError("other runs remove whatever is begun here", where=target, mend="run them one after the other")


def _attempt(target: Path, parents: tuple[Path, ...]) -> Scratch | None:
    """A held scratch folder, or None if another run has just removed it, or a parent that it found empty."""
    file = next((parent for parent in target.parents if parent.is_file()), None)
    if file:
        raise NotADirectoryError(errno.ENOTDIR, f"{file} is a file, not a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{_stem(target.name)}.new-", dir=target.parent))
        lock = _take_lock(folder)
    except FileNotFoundError:
        return None
    except NoLocks:
        return Scratch(target, folder, None, parents)
    return None if lock is None else Scratch(target, folder, lock, parents)


def _remove_empty(parents: tuple[Path, ...]) -> None:
    for parent in reversed(parents):
        with suppress(OSError):
            os.rmdir(parent)


def _take_lock(folder: Path) -> int | None:
    """The descriptor of a folder's lock; None if another has it, or the folder is gone."""
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    try:
        if locked(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except FileNotFoundError:
        pass  # swept between the two steps
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def locked(descriptor: int) -> bool:
    """Lock an open file for this process alone; False if another one has it.

    Raises:
        NoLocks: its file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks from error
        return False
    return True


def _remove_former(path: Path, put_back: Path | None) -> None:
    """Remove a leftover of the former naming, or put it back as `put_back` if nothing is there, unless it is locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if not locked(descriptor):
            return
        if put_back and not put_back.exists():
            os.rename(path, put_back)  # killed between two renames
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except (NoLocks, OSError):
        pass
    finally:
        os.close(descriptor)


def _refuse_what_cannot_be_moved(target: Path) -> None:
    """Raise a PipelineError if a rename could not move what is at `target`, or would move another file system along."""
    mounted = next((m for m in _mount_points() if m == target or target in m.parents), None)
    if mounted:
        raise PipelineError(
            "cannot be replaced: it is a mount point" if mounted == target else f"holds a mount point, {mounted}",
            where=target,
            mend="choose a directory inside of the mounted one" if mounted == target else "choose another place",
        )
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
        raise PipelineError("is write-protected", where=target, mend="make it writable, or choose another place")


def _mount_points() -> list[Path]:
    """Where file systems are mounted, as this process sees it; bind mounts too, whose device number tells nothing."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    # The fifth field; a space in it is written \040.
    fields = (line.split(b" ")[4] for line in lines)
    return [Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), field))) for field in fields]


def _stem(name: str) -> str:
    """A target's name as its scratch folder carries it; of a long one, the start and a digest."""
    raw = os.fsencode(name)
    if len(raw) <= _LONGEST_STEM:
        return name
    return raw[:90].decode("utf-8", "ignore") + "-" + hashlib.sha256(raw).hexdigest()[:16]
