"""What given files hold, told by digests that are remembered for as long as the files stay as they are.

Adapters, pruned models, dense models and texts that a user brings enter the workflow by what they hold, not by when
they were written: a link that points elsewhere, or a file copied with its old time, is other content; a touched file,
or another way to write the path, is not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from mistral_prune_lora.errors import DataError, PipelineError
from mistral_prune_lora.provenance import file_sha256, record_sha256
from mistral_prune_lora.storage.json_file import read_json_if_there, write_json
from mistral_prune_lora.storage.transaction import atomic_file

_WORTH_A_LINE = 1_000_000_000  # bytes; digesting them takes about a second


def one_path(path: str | Path) -> str:
    """The one spelling of a path: relative to the working directory inside of it, else absolute; links are kept.

    A rule's inputs are told apart by their spelling, so that `./dense`, `dense/` and its absolute path must be one.
    """
    absolute = os.path.abspath(path)
    inside = os.path.relpath(absolute)
    return absolute if inside.split(os.sep)[0] == os.pardir else inside


class Content:
    """Digests of files, remembered in a file from run to run.

    A file counts as unchanged while its real path, device, inode, size, and its times of modification and of change,
    in ns, are those that it was digested with. A touch costs another look, and changes no digest.
    """

    def __init__(self, memory: str | Path) -> None:
        """Args: memory: the file to remember them in; one that is missing or malformed is begun anew."""
        self._memory = Path(memory)
        known: Mapping = {}
        with suppress(PipelineError):
            known = read_json_if_there(self._memory) or {}
        self._known = {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 6}
        self._changed = False

    def sha256(self, path: str | Path) -> str:
        """The sha256 of a file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            real = os.path.realpath(path)
            state = os.stat(real)
            told = [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            entry = self._known.get(real)
            if entry is None or entry[:5] != told:
                if state.st_size >= _WORTH_A_LINE:
                    print(f"{path}: looking at its {state.st_size / 1e9:.1f} GB, once", file=sys.stderr)
                entry = [*told, file_sha256(real)]
                self._known[real], self._changed = entry, True
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=path, mend="name a file that is there") from None
        return entry[5]

    def identity(self, files: Iterable[str | Path], root: str | Path) -> str:
        """One digest of some files: of what they hold, and of their names below a folder, wherever that lies."""
        return record_sha256({os.path.relpath(file, root): self.sha256(file) for file in files})

    def keep(self) -> None:
        """Remember what was learnt, together with what another process has remembered since.

        That it cannot be written costs time, and nothing else.
        """
        if not self._changed:
            return
        with suppress(PipelineError, OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            merged = {**(read_json_if_there(self._memory) or {}), **self._known}
            gone = [name for name in merged if not os.path.exists(name)]
            for name in gone:
                del merged[name]
            with atomic_file(self._memory) as fresh:
                write_json(fresh, merged)
            self._changed = False


def short_key(recipe: Mapping) -> str:
    """Twelve hex digits that are the same for equal recipes: what something is made from, and how."""
    return record_sha256(json.loads(json.dumps(recipe)))[:12]
