"""Which tokenizer belongs to a model, an A directory, a bundle or an adapter: five places, in order of priority.

1. the path the user names, 2. the base model itself, 3. its `original_config/`, 4. what the adapter's
`adapter_config.json` names as its base model, 5. what the base model's `manifest.json` names as its base model.
A folder named in 4 and 5 may hold its tokenizer in its own `original_config/`.

transformers is imported only when a tokenizer is loaded: a merge that just copies the files stays light.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.hub import fetched_files
from mistral_prune_lora.storage.json_file import read_json_if_there
from mistral_prune_lora.storage.plain_file import check_plain, lies_there

# Any one of these groups is a tokenizer; the other names only add to it. A tokenizer.model by itself is not: which
# special tokens go around a text stands in tokenizer_config.json, and transformers guesses wrong without it.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model", "tokenizer_config.json"),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
_MORE_TEMPLATES = "additional_chat_templates"
# Names and globs. Mistral's repositories also carry versioned SentencePiece models and tekken.json, which servers read.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{_MORE_TEMPLATES}/*.jinja",
)
_MAX_BYTES = 1 << 30  # of a tokenizer's file; the largest have some 30 MB
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_tokenizer(
    base_model_path: str | Path, *, tokenizer_path: str | Path | None = None, adapter_path: str | Path | None = None
):
    """Load the tokenizer that `find_tokenizer` finds; of Hub ids, the first that can be had.

    Args:
        base_model_path: a model, A or bundle directory, or a Hub id (a str: a Path is never taken for one).
        tokenizer_path: the user's own choice; nothing else is tried if it is given.
        adapter_path: a LoRA adapter's directory, asked for its base model.

    Returns:
        A transformers tokenizer whose `name_or_path` is the absolute path or Hub id that it came from.

    Raises:
        CheckpointError: there is none in any place (names every place tried), its files are malformed, or it brings
            code of its own, which is never run.
    """
    from transformers import AutoTokenizer

    tried = []
    for step, place, problem in _places(base_model_path, tokenizer_path, adapter_path):
        if place is None:
            tried.append(f"{step}: {problem}")
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(place), trust_remote_code=False)
            tokenizer("text")  # some settings are only looked at when there is something to do
        except BaseException as error:  # whatever a malformed file provokes in one of three tokenizer libraries
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(place, Path):
                raise CheckpointError(
                    f"the tokenizer cannot be loaded: {first}", where=place, mend="copy the tokenizer files there again"
                ) from error
            tried.append(f"{step}: {place} on the Hub: {first}")
            continue
        if getattr(tokenizer, "init_kwargs", {}).get("auto_map"):
            raise _brings_code(place)
        return tokenizer
    raise _not_found(tried)


def find_tokenizer(
    base_model_path: str | Path, *, tokenizer_path: str | Path | None = None, adapter_path: str | Path | None = None
) -> Path | str:
    """The first place of the chain that has a tokenizer: an absolute directory, or a Hub id (which is not asked).

    Arguments as for `load_tokenizer`.

    Raises:
        CheckpointError: there is none in any place (names every place tried), or it brings code of its own.
    """
    tried = []
    for step, place, problem in _places(base_model_path, tokenizer_path, adapter_path):
        if place is not None:
            return place
        tried.append(f"{step}: {problem}")
    raise _not_found(tried)


def tokenizer_files(path: str | Path) -> list[Path]:
    """The tokenizer's files in a directory, sorted by name; empty if they do not make up a tokenizer.

    A second chat template lies in a directory below.

    Raises:
        CheckpointError: one of them is a pipe, a folder or the like, which the libraries would wait for or pass over,
            or is larger than any tokenizer's.
    """
    folder = Path(os.path.abspath(path))
    there = sorted({file for pattern in TOKENIZER_FILES for file in _found(folder, pattern)})
    names = {file.name for file in there if file.parent == folder}
    if not any(names.issuperset(group) for group in _VOCABULARIES):
        return []
    for file in there:
        check_plain(file, CheckpointError, max_bytes=_MAX_BYTES, mend="copy the tokenizer files there again")
    return there


def _found(folder: Path, pattern: str) -> list[Path]:
    """What has a name of this pattern, be it a dead link, which a glob of a plain name would pass over."""
    if "*" in pattern:
        return list(folder.glob(pattern))
    return [folder / pattern] if lies_there(folder / pattern) else []


def local_tokenizer_files(
    base_model_path: str | Path, *, tokenizer_path: str | Path | None = None, adapter_path: str | Path | None = None
) -> list[Path]:
    """The files of the tokenizer that `find_tokenizer` finds, to be copied to a model that is written.

    Arguments as for `load_tokenizer`.

    Raises:
        CheckpointError: there is none, or only on the Hub.
    """
    place = find_tokenizer(base_model_path, tokenizer_path=tokenizer_path, adapter_path=adapter_path)
    if isinstance(place, str):
        raise CheckpointError(
            f"the tokenizer is only on the Hub, as {place}",
            where=base_model_path,
            mend="download it, and give its directory with --tokenizer_path",
        )
    return tokenizer_files(place)


def copy_settings(files: Iterable[Path], folder: Path) -> None:
    """Copy a model's small files into another model's directory; a second chat template goes into its own below."""
    for file in files:
        below = file.parent.name if file.parent.name == _MORE_TEMPLATES else ""
        (folder / below).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / below / file.name)


def own_tokenizer(model_dir: str | Path) -> Path | None:
    """The directory of the tokenizer that a model brings along: its own or its original_config; None without one."""
    folders = (Path(model_dir), Path(model_dir) / "original_config")
    return next((folder for folder in folders if tokenizer_files(folder)), None)


def is_tokenizer_of(own: Path, name: str, identity: str) -> bool:
    """Whether token ids were made with a tokenizer that gives the ids of another one.

    Equal files do. So do files of another version of the library, which are written otherwise; such tokenizers are
    loaded and compared.

    Args:
        own: the directory of the other one.
        name: directory or Hub id that the ids' tokenizer came from; a Hub id is looked up in the local cache only.
        identity: its `tokenizer_identity`.
    """
    if tokenizer_identity(own) == identity:
        return True
    try:
        theirs = Path(name) if os.path.isdir(name) else _cached(name)
        if tokenizer_identity(theirs) != identity:  # no longer what it was
            return False
        meanings = [_meaning(load_tokenizer(folder, tokenizer_path=folder)) for folder in (own, theirs)]
    except CheckpointError:
        return False
    return meanings[0] is not None and meanings[0] == meanings[1]


def _meaning(tokenizer) -> dict | None:
    """What a tokenizer does with a text, as one version of the library writes it; None if it does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}


def tokenizer_identity(path: str | Path) -> str:
    """The sha256 over names and bytes of a tokenizer's files; of a Hub id, over those files in the local Hub cache.

    Raises:
        CheckpointError: there is no tokenizer.
    """
    folder = Path(path) if os.path.isdir(path) else _cached(os.fspath(path))
    files = tokenizer_files(folder)
    if not files:
        raise CheckpointError("there is no tokenizer", where=path, mend="name a directory with tokenizer files")
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _places(
    base_model_path: str | Path, tokenizer_path: str | Path | None, adapter_path: str | Path | None
) -> Iterator[tuple[str, Path | str | None, str | None]]:
    """The chain as (step, place, None), or (step, None, what is missing there)."""
    if tokenizer_path is not None:
        yield "--tokenizer_path", *_resolve(tokenizer_path)
        return
    yield "the base model", *_resolve(base_model_path)
    if not os.path.isdir(base_model_path):
        original = None
    else:
        original = Path(base_model_path) / "original_config"
        yield "its original_config", *_resolve(original)
    for step, file, key in (
        (
            "the adapter's base model",
            Path(adapter_path) / "adapter_config.json" if adapter_path else None,
            "base_model_name_or_path",
        ),
        ("the manifest's base model", Path(base_model_path) / "manifest.json", "base_model"),
    ):
        named, problem = _named_in(file, key)
        if named is None:
            yield step, None, problem
            continue
        place, problem = _resolve(named)
        if problem and os.path.isdir(named):
            place, second = _resolve(Path(named) / "original_config")
            problem = second and problem
        yield step, place, problem


def _resolve(path: str | Path) -> tuple[Path | str | None, str | None]:
    """(directory or Hub id, None), or (None, what is missing)."""
    if os.path.exists(path):
        # Absolute, because transformers may take a relative path for the id of a Hub repository.
        folder = Path(os.path.abspath(path))
        if tokenizer_files(folder):
            _refuse_code(folder)
            return folder, None
        bare = (folder / "tokenizer.model").is_file()
        return (
            None,
            f"{folder} has {'a tokenizer.model without its tokenizer_config.json' if bare else 'no tokenizer files'}",
        )
    name = os.fspath(path)
    if isinstance(path, str) and _HUB_ID.fullmatch(name):
        return name, None
    return None, f"{name} does not exist"


def _refuse_code(folder: Path) -> None:
    """Raise a CheckpointError for a tokenizer whose files name code to be imported, before anything loads them.

    So it does where they cannot be read: nobody knows what they name.
    """
    for name in ("tokenizer_config.json", "config.json"):  # of both, transformers follows the auto_map
        content = read_json_if_there(folder / name, CheckpointError)
        if content and content.get("auto_map"):
            raise _brings_code(folder / name)


def _brings_code(where: Path | str) -> CheckpointError:
    return CheckpointError(
        "there is an auto_map: this tokenizer or model brings code of its own, and such ones are not taken",
        where=where,
        mend="give --tokenizer_path a tokenizer of transformers' own classes",
    )


def _named_in(file: Path | None, key: str) -> tuple[str, None] | tuple[None, str]:
    if not file:
        return None, "no adapter given"
    try:
        content = read_json_if_there(file)
    except PipelineError as error:
        return None, f"{file} {error.what}"
    if content is None:
        return None, f"there is no {file}"
    named = content.get(key)
    return (named, None) if isinstance(named, str) and named else (None, f"{file} names no {key}")


def _cached(repo_id: str) -> Path:
    folder = fetched_files(repo_id, TOKENIZER_FILES)
    if folder is None:
        raise CheckpointError(
            "is neither a directory nor a Hub model in the local cache", where=repo_id, mend="load its tokenizer first"
        )
    return folder


def _not_found(tried: list[str]) -> CheckpointError:
    return CheckpointError(
        f"no tokenizer found; tried {'; '.join(tried)}",
        mend="give --tokenizer_path a directory with a tokenizer.json, or a Hub id",
    )
