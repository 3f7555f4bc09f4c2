"""Full disks: a command writes to a small tmpfs that is too small, or that somebody else fills meanwhile."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from attack.classify import Column, Verdict, leftovers, of_ending, snapshot
from attack.deeds import DEEDS, Deed
from attack.kills import Expected, again, begin, expect, whole
from attack.room import PATIENCE, Room
from attack.server import Ended

_BY_NAME = {deed.name: deed for deed in DEEDS}
_ROOMY = 400 << 20  # bytes beyond what a command needs, of which it asks some to be free before it begins


@dataclass(frozen=True)
class DiskCase:
    """One full disk.

    Attributes:
        name: for --only.
        deed: the command's name.
        former: whether a former result of the command lies there.
        filled: whether the disk is large at first and filled while the command runs; else it is small from the start.
        share: of the result's size, that is free; or of the command's usual time, after which the disk is filled.
    """

    name: str
    deed: str
    former: bool
    filled: bool
    share: float

    def __str__(self) -> str:
        way = f"filled after {self.share:.1%} of its time" if self.filled else f"with room for {self.share:.1%} of it"
        return f"{self.name}: {self.deed}{', over a former result' * self.former}, on a disk {way}"


def disk_cases(count: int, seed: int) -> list[DiskCase]:
    """Full disks, the commands in turn."""
    draw, cases = random.Random(seed), []
    for number in range(count):
        turn = number // len(DEEDS)
        share = draw.uniform(0, 1.2 if turn % 2 else 1)
        cases.append(
            DiskCase(f"disk-{number:03d}", DEEDS[number % len(DEEDS)].name, turn % 4 > 1, turn % 2 == 0, share)
        )
    return cases


def may_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    try:
        with _mounted(folder, 1 << 20):
            return True
    except PermissionError:
        return False


@contextmanager
def _mounted(place: Path, size: int) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        raise PermissionError("this user may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def attack_disk(room: Room, case: DiskCase) -> Verdict:
    """Run a command on a disk that becomes full, look, and run it again where there is room."""
    deed = _BY_NAME[case.deed]
    expected = expect(room, deed, former=case.former)
    begin(room, deed, former=case.former)
    old = room.folder / "aside/old"
    room.out.rename(old)
    new_size = room.once(("size", deed.name), lambda: _new_size(room, deed))
    room.clear()
    free = _ROOMY if case.filled else int(case.share * new_size)
    try:
        with _mounted(room.out, _size(old) + max(free, 1 << 16)):
            subprocess.run(["cp", "-a", f"{old}/.", str(room.out)], check=True)
            before = snapshot(room.out)
            child = room.start(lambda: deed.main(list(deed.words)))
            if case.filled:
                time.sleep(case.share * expected.seconds)
                _fill(room.out / "somebody else's")
            ended = child.wait(PATIENCE) or child.kill()
            (room.out / "somebody else's").unlink(missing_ok=True)
            verdict = _judged(room, deed, expected, ended, before)
            return (again(room, deed, expected) if case.filled else None) or verdict
    finally:
        room.clear()
        subprocess.run(["rm", "-rf", str(old)], check=True)


def _new_size(room: Room, deed: Deed) -> int:
    begin(room, deed, former=False)
    room.must(deed.name, lambda: deed.main(list(deed.words)))
    return _size(room.out)


def _size(folder: Path) -> int:
    """What it takes on a tmpfs: whole pages, directories too."""
    return sum(-(-path.lstat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*")) + (1 << 16)


def _fill(path: Path) -> None:
    """Take all room that there is, to the last page."""
    step = 64 << 20
    with open(path, "wb") as file:
        while step >= 4096:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), step)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 4


def _judged(room: Room, deed: Deed, expected: Expected, ended: Ended, before: dict[str, object]) -> Verdict:
    """A disk that is full in the middle ends the command with one line, and all is as before; or all is done."""
    verdict = of_ending(ended)
    if verdict is not None and verdict.column is not Column.REFUSED:
        return verdict
    wrong = whole(room, deed, expected.new if verdict is None else before)
    if wrong:
        return wrong
    if leftovers(room.out):
        return Verdict(Column.LEFT, f"{leftovers(room.out)}")
    if verdict is None:
        return Verdict(Column.SAME)
    now = snapshot(room.out)
    strange = {name for name in now.keys() - before.keys() if name.split("/")[0] not in deed.works_in}
    return Verdict(Column.LEFT, f"{sorted(strange)[:5]}") if strange else verdict
