"""Which pruning a part is of: a digest that pruning writes into A and the bundles, and what may be put together.

Two parts of one layout may come from different dense models; nothing in their layers shows it, and their stages would
have a perplexity like any other. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from mistral_prune_lora.checkpoints.directories import BUNDLE_META, is_bundle_dir, is_model_dir
from mistral_prune_lora.checkpoints.manifest import MANIFEST, read_manifest
from mistral_prune_lora.errors import LayoutError, printable
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage.json_file import read_json

KEY = "pruning_identity"
_SHA256 = re.compile("[0-9a-f]{64}")
_SHOWN = 12  # digits of an identity that a message shows


def pruning_identity(layout: Layout, tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """The identity of a pruning: the same for the same dense weights and layout, however they lie in files.

    Args:
        layout: the layers of each part.
        tensors: all tensors of the dense model by canonical name: safetensors dtype name, shape, sha256 of the bytes.

    Returns:
        A sha256 in hex.
    """
    digest = hashlib.sha256(f"{layout.num_layers}\0{list(layout.b)}\0{list(layout.c)}\0".encode())
    for name, (dtype, shape, sha256) in sorted(tensors.items()):
        digest.update(f"{name}\0{dtype}\0{list(shape)}\0{sha256}\0".encode())
    return digest.hexdigest()


def read_identity(part: str | Path) -> str | None:
    """The identity that a model's manifest.json or a bundle's bundle_meta.json carries; None if it carries none.

    Raises:
        LayoutError: the file cannot be read, or what stands there is no identity.
    """
    folder = Path(part)
    if is_model_dir(folder):
        file, content = folder / MANIFEST, read_manifest(folder) or {}
    else:
        file = folder / BUNDLE_META
        content = read_json(file, LayoutError) if file.is_file() else {}
    value = content.get(KEY)
    if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise LayoutError(
            f"{KEY} is {value!r}, not a sha256",
            where=file,
            mend="put back what pruning wrote, or strike it out",
        )
    return value


def check_same_pruning(parts: Iterable[str | Path | None]) -> str | None:
    """Refuse parts of different prunings; take parts that do not say what they are of, with a line on stderr.

    The line is printed once in a process for the same parts. A single part goes with itself, so nothing is said of it.

    Args:
        parts: as for `identities`.

    Returns:
        The identity that all parts have; None if one of them has none, or there is no part.

    Raises:
        LayoutError: as `identities`.
    """
    told = identities(parts)
    unknown = [folder for folder, identity in told.items() if identity is None]
    if unknown and len(told) > 1:
        _say(_without_identity(unknown, told))
    return None if unknown else next(iter(told.values()), None)


def identities(parts: Iterable[str | Path | None]) -> dict[Path, str | None]:
    """The identities of parts that are to be put together, by directory.

    Args:
        parts: directories of A models and bundles, merged or not. What is none is passed over: None, a dense model (it
            has no manifest.json), a Hub id.

    Raises:
        LayoutError: two parts are of different prunings; or one of them carries an identity that is none.
    """
    folders = dict.fromkeys(Path(os.path.abspath(part)) for part in parts if part is not None)
    told = {folder: read_identity(folder) for folder in folders if _is_part(folder)}
    known = {folder: identity for folder, identity in told.items() if identity}
    for folder, identity in known.items():
        first = next(iter(known))
        if identity != known[first]:
            raise LayoutError(
                f"is of the pruning {identity[:_SHOWN]}, and {first} is of the pruning {known[first][:_SHOWN]}",
                where=folder,
                mend="use the A model and the bundles of one pruning",
            )
    return told


def _is_part(folder: Path) -> bool:
    return is_bundle_dir(folder) or (is_model_dir(folder) and (folder / MANIFEST).is_file())


def _without_identity(unknown: list[Path], told: Mapping[Path, str | None]) -> str:
    named = printable(", ".join(map(os.fspath, unknown)))
    has = "has" if len(unknown) == 1 else "have"
    known = next(((folder, identity) for folder, identity in told.items() if identity), None)
    beside = f", and {printable(os.fspath(known[0]))} is of the pruning {known[1][:_SHOWN]}" if known else ""
    return f"{named} {has} no {KEY}{beside}: taken as parts of one pruning, which nothing shows"


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
