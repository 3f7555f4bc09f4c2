"""What a command did with what it was given: one word for the table, and what to say of it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from attack.server import Ended

LONGEST = 500
_MEMORY = 2 << 30  # bytes that no command over this small project has a use for
_LARGEST = 64 << 20
_SECONDS = re.compile(rb'"seconds": [0-9.]+')  # that training took: of all that is written, it alone differs


class Column(Enum):
    """A column of the table: the first three are right, all others are faults."""

    SAME = "same result"
    REFUSED = "refused in one line"
    TAKEN = "taken at its word"
    OTHERWISE = "refused otherwise"
    TRACEBACK = "traceback"
    HANG = "hang"
    MEMORY = "memory"
    WRONG = "silent wrong"
    LOST = "data lost"
    LEFT = "left behind"


RIGHT = (Column.SAME, Column.REFUSED, Column.TAKEN)


@dataclass(frozen=True)
class Verdict:
    """What one case came to."""

    column: Column
    told: str = ""


def of_ending(ended: Ended | None) -> Verdict | None:
    """The verdict on how a command ended; None if it ended with success, so that its result is to be judged."""
    if ended is None:
        return Verdict(Column.HANG)
    tail = ended.printed[-2000:]
    if "Traceback (most recent call last)" in ended.printed or ended.code is None:
        return Verdict(Column.TRACEBACK, f"signal {ended.signal}; {tail}")
    if ended.grown > _MEMORY:
        return Verdict(Column.MEMORY, f"{ended.grown >> 20} MiB; {tail}")
    if ended.code == 0:
        return None
    lines = ended.printed.split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or ended.code != 1:
        return Verdict(Column.OTHERWISE, f"exit code {ended.code}, {len(errors)} error lines; {tail}")
    after = lines[lines.index(errors[0]) :]
    if any(len(line) > LONGEST + 2 or not line.isprintable() for line in after):
        return Verdict(Column.OTHERWISE, f"a line that is too long or not printable; {tail}")
    if "not enough memory" in errors[0]:
        return Verdict(Column.MEMORY, errors[0])
    return Verdict(Column.REFUSED, errors[0])


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below a folder: what a regular file holds, where a link leads, what kind anything else is of."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            found[os.path.relpath(path, folder)] = content_of(path)
    return found


def content_of(path: str | Path) -> object:
    """What lies at a path, as a snapshot has it; None if nothing does."""
    if not os.path.lexists(path):
        return None
    told = os.lstat(path)
    if stat.S_ISLNK(told.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(told.st_mode):
        return stat.S_IFMT(told.st_mode)
    if told.st_size > _LARGEST:
        return told.st_size
    with open(path, "rb") as file:
        return hashlib.sha256(_SECONDS.sub(b"", file.read())).hexdigest()


def difference(before: dict[str, object], after: dict[str, object]) -> str:
    """What is other in two snapshots, in words; empty if nothing is."""
    told = [f"{name} is gone" for name in before.keys() - after.keys()]
    told += [f"{name} is new" for name in after.keys() - before.keys()]
    told += [f"{name} has changed" for name in before.keys() & after.keys() if before[name] != after[name]]
    return ", ".join(sorted(told)[:5])


def leftovers(folder: Path) -> list[str]:
    """Scratch folders that nobody has cleared away."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if re.search(r"\.(new|old)-", path.name))
