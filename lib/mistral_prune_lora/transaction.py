"""All or nothing on disk: what is written appears whole under its name, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_prune_lora.errors import PipelineError

# Every name that a model, bundle, merge or adapter directory of this pipeline may hold. A directory with anything else
# in it is somebody's, and is never replaced.
_OURS = re.compile(
    r"config\.json|generation_config\.json|manifest\.json|bundle_meta\.json|layers_map\.json|prune_log\.json"
    r"|(merge|export|source)\.json|model\.safetensors|model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json"
    r"|layer_\d+\.safetensors|stage[23]_layers_[BC]\.safetensors|original_config|adapter_config\.json"
    r"|adapter_model\.safetensors|README\.md|training\.(json|csv)|tokenizer.*|tekken\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)|additional_chat_templates"
    r"|\.snakemake_timestamp"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_own: set[Path] = set()  # what this process is writing now


@contextmanager
def atomic_directory(target: str | Path, also: Collection[str] = ()) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends without an exception.

    A kill at any point leaves the old directory or the new one, whole, under the name; what a killed run left beside it
    is removed by the next one. Files of a former result do not survive in the new one. Where the file system cannot
    exchange two directories, the old one is out of its place for a moment; the next run puts it back if it has to.

    Args:
        target: the directory.
        also: names beside the usual ones that this command writes, and that a former result may hold.

    Raises:
        PipelineError: `target` is a file, or holds files that this pipeline does not write.
    """
    target = Path(os.path.realpath(target))  # of a link, the directory it leads to is replaced
    refuse_foreign(target, also)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-{os.getpid()}-", dir=target.parent))
    _own.add(fresh)
    try:
        os.chmod(fresh, 0o777 & ~_umask())
        yield fresh
        _sync_tree(fresh)
        _put_in_place(fresh, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange, the former result
        _own.discard(fresh)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A path beside `target` to write to; fsynced and renamed over it when the block ends without an exception.

    What a killed run left beside it is removed by the next one.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    # The suffix is kept: writers such as pandas and matplotlib choose the format by it.
    prefix = f".{target.name}.new-{os.getpid()}-"
    descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=target.suffix, dir=target.parent)
    os.close(descriptor)
    fresh = Path(name)
    _own.add(fresh)
    try:
        os.chmod(fresh, 0o666 & ~_umask())
        yield fresh
        _sync(fresh)
        os.replace(fresh, target)
        _sync(target.parent)
    finally:
        fresh.unlink(missing_ok=True)
        _own.discard(fresh)


@contextmanager
def scratch_directory(target: str | Path) -> Iterator[Path]:
    """A directory beside `target` for work on the way to it, removed with all that it holds when the block ends.

    What a killed run left is removed by the next one, and whenever `target` itself is written.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-{os.getpid()}-", dir=target.parent))
    _own.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _own.discard(folder)


def refuse_foreign(target: str | Path, also: Collection[str] = ()) -> None:
    """Raise a PipelineError if `target` cannot be replaced by a result without losing somebody's files.

    Args:
        target: where a directory is to be written.
        also: names beside the usual ones that are this command's own.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise PipelineError("the output directory is a file", where=target, mend="choose another --output_dir")
    there = [p.name for p in target.iterdir()] if target.is_dir() else []
    foreign = sorted(name for name in there if not is_usual_name(name) and name not in also)
    if foreign:
        raise PipelineError(
            f"the output directory holds files of another origin: {', '.join(foreign[:5])}",
            where=target,
            mend="choose an empty or new directory, so that nothing of yours is replaced",
        )


def is_usual_name(name: str) -> bool:
    """Whether a file or folder of this name may lie in a directory that this pipeline writes, whatever the command."""
    return _OURS.fullmatch(name) is not None


def _put_in_place(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; a former `target` is then called `fresh`, or is gone."""
    if not target.exists():
        os.rename(fresh, target)
        return
    if _exchange(fresh, target):
        return
    old = fresh.with_name(fresh.name.replace(".new-", ".old-"))
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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


def nearest_directory(path: Path) -> Path:
    """A path, or the first of its parents, that is a directory: whose file system something new there would be on."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


def _sweep(target: Path) -> None:
    """Remove what killed runs left beside `target`; what a living process is writing is left alone."""
    leftover = re.compile(re.escape(f".{target.name}.") + r"(new|old)-(\d+)-.*")
    for path in sorted(target.parent.iterdir()):
        match = leftover.fullmatch(path.name)
        if not match or path in _own or _alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            os.rename(path, target)  # killed between two renames
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    """Whether another process of this number lives; in a fresh container ours may be that of one that was killed."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent) / name)
        _sync(Path(parent))
