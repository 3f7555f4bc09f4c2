"""All or nothing on disk: what is written appears whole under its name, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_prune_lora.errors import PipelineError

# Every name that a model, bundle, merge or adapter directory of this pipeline may hold. A directory with anything else
# in it is somebody's, and is never replaced.
_OURS = re.compile(
    r"config\.json|generation_config\.json|manifest\.json|bundle_meta\.json|merge\.json|layers_map\.json|prune_log\.json"
    r"|source\.json|model\.safetensors|model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json"
    r"|layer_\d+\.safetensors|original_config|adapter_config\.json|adapter_model\.safetensors|README\.md"
    r"|training\.(json|csv)|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.(jinja|json)|\.snakemake_timestamp"
)


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends without an exception.

    A kill at any point leaves the old directory whole, or (between two renames) none, never a mixture; what a killed
    run left beside it is removed by the next one. Files of a former result do not survive in the new one.

    Raises:
        PipelineError: `target` is a file, or holds files that this pipeline does not write.
    """
    target = Path(os.path.abspath(target))
    refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-{os.getpid()}-", dir=target.parent))
    os.chmod(fresh, 0o777 & ~_umask())
    try:
        yield fresh
        _sync_tree(fresh)
        old = fresh.with_name(fresh.name.replace(".new-", ".old-"))
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A path beside `target` to write to; fsynced and renamed over it when the block ends without an exception."""
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: writers such as pandas and matplotlib choose the format by it.
    descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}.new-", suffix=target.suffix, dir=target.parent)
    os.close(descriptor)
    fresh = Path(name)
    os.chmod(fresh, 0o666 & ~_umask())
    try:
        yield fresh
        _sync(fresh)
        os.replace(fresh, target)
        _sync(target.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def refuse_foreign(target: str | Path) -> None:
    """Raise a PipelineError if `target` cannot be replaced by a result without losing somebody's files."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise PipelineError("the output directory is a file", where=target, mend="choose another --output_dir")
    foreign = sorted(p.name for p in target.iterdir() if not _OURS.fullmatch(p.name)) if target.is_dir() else []
    if foreign:
        raise PipelineError(
            f"the output directory holds files of another origin: {', '.join(foreign[:5])}",
            where=target,
            mend="choose an empty or new directory, so that nothing of yours is replaced",
        )


def _sweep(target: Path) -> None:
    """Remove what killed runs left beside `target`; a directory whose process still lives is left alone."""
    leftover = re.compile(re.escape(f".{target.name}.") + r"(?:new|old)-(\d+)-.*")
    for path in target.parent.iterdir():
        match = leftover.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
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
