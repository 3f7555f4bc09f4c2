"""What files come to: edits of a file, each of which is data, so that it can be told and made again.

An edit names a function and its arguments, all of them numbers and words. Places are shares of what is there (0.5 is
the middle), so that every edit fits every file; one that finds nothing to change leaves the file alone.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attack.byte_edits import BYTE_EDITS, NODES
from attack.gguf_edits import GGUF_EDITS
from attack.json_edits import JSON_EDITS
from attack.row_edits import ROW_EDITS
from attack.safetensors_edits import SAFETENSORS_EDITS
from attack.yaml_edits import YAML_EDITS

EDITS: dict[str, Callable[..., bytes]] = {
    **BYTE_EDITS,
    **GGUF_EDITS,
    **JSON_EDITS,
    **ROW_EDITS,
    **SAFETENSORS_EDITS,
    **YAML_EDITS,
}


@dataclass(frozen=True)
class Edit:
    """One step of spoiling a file: the name of a function and its arguments."""

    kind: str
    arguments: tuple = ()

    def __str__(self) -> str:
        told = ", ".join(f"{a:.4f}" if isinstance(a, float) else str(a) for a in self.arguments)
        return f"{self.kind} ({told})" if told else self.kind


@dataclass(frozen=True)
class Spoiling:
    """What is done to a file: another node is put in its place, or its bytes are edited, step by step."""

    node: str | None
    edits: tuple[Edit, ...] = ()

    def __str__(self) -> str:
        return self.node or ", then ".join(map(str, self.edits))

    def put(self, path: Path, valid: bytes) -> None:
        """Put the result at a path at which nothing lies."""
        if self.node:
            NODES[self.node](path)
            return
        path.write_bytes(self.applied(valid))

    def applied(self, valid: bytes) -> bytes:
        """The bytes after all edits."""
        for edit in self.edits:
            valid = EDITS[edit.kind](valid, *edit.arguments)
        return valid

    def spoils(self, valid: bytes) -> bool:
        """Whether anything is other afterwards."""
        # A bomb takes seconds to make, and is never what was there.
        return bool(self.node) or any(edit.kind == "a bomb" for edit in self.edits) or self.applied(valid) != valid


@contextlib.contextmanager
def spoilt(path: Path, spoiling: Spoiling, aside: Path) -> Iterator[None]:
    """The file, spoilt for the length of the block; then the same file again.

    Args:
        path: the file.
        spoiling: what is done to it.
        aside: a directory on the same file system, where it lies meanwhile.
    """
    kept = Path(tempfile.mkdtemp(dir=aside)) / path.name
    valid = path.read_bytes()
    path.rename(kept)
    try:
        spoiling.put(path, valid)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        kept.rename(path)
        kept.parent.rmdir()
