"""The campaign as a command: draws cases, attacks with two processes, prints the table."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from attack import server
from attack.classify import RIGHT, Column, Verdict
from attack.contradictions import ContradictionCase, attack_with_contradiction, contradiction_cases
from attack.deeds import DEEDS
from attack.disk import DiskCase, attack_disk, disk_cases, may_mount
from attack.files import attack_file
from attack.formats import Kind
from attack.kills import KillCase, attack_kill, kill_cases
from attack.room import Room
from attack.scenes import SCENES, files_of
from attack.strategies import FileCase, Target, file_cases
from attack.table import table, write_table
from attack.writers import WritersCase, attack_together, writers_cases
from mistral_prune_lora.provenance import VERSION

Case = FileCase | KillCase | DiskCase | WritersCase | ContradictionCase
_ATTACKS: dict[type, Callable[[Room, Case], Verdict]] = {
    FileCase: attack_file,
    KillCase: attack_kill,
    DiskCase: attack_disk,
    WritersCase: attack_together,
    ContradictionCase: attack_with_contradiction,
}
_ROWS = [
    *(f"file: {kind.value.told}" for kind in Kind),
    *(f"{what}: {deed.name}" for what in ("kill", "full disk", "two writers") for deed in DEEDS),
    "contradictory arguments",
]
_room: Room | None = None


def row_of(case: Case) -> str:
    """The row of the table that a case counts in."""
    if isinstance(case, FileCase):
        return f"file: {case.kind.value.told}"
    if isinstance(case, ContradictionCase):
        return "contradictory arguments"
    what = {KillCase: "kill", DiskCase: "full disk", WritersCase: "two writers"}[type(case)]
    return f"{what}: {case.first if isinstance(case, WritersCase) else case.deed}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python tests/attack",
        description="Attack every command: with hostile files, kills, full disks and rival writers. Ends with exit code"
        " 1 if one of them was not borne.",
    )
    p.add_argument("--seed", type=int, default=0, help="draws all cases (default: %(default)s)")
    p.add_argument("--files", type=int, default=1518, metavar="N", help="hostile files (default: %(default)s)")
    p.add_argument("--kills", type=int, default=204, metavar="N", help="kills (default: %(default)s)")
    p.add_argument("--disks", type=int, default=24, metavar="N", help="full disks (default: %(default)s)")
    p.add_argument("--writers", type=int, default=24, metavar="N", help="pairs of writers (default: %(default)s)")
    p.add_argument(
        "--contradictions", type=int, default=1, choices=(0, 1), help="arguments that contradict (default: %(default)s)"
    )
    p.add_argument("--only", metavar="NAME", help="one case, or those whose names start so; all else as above")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=20, metavar="X", help="end after so long (default: %(default)s)")
    p.add_argument("--output", type=Path, metavar="FILE", help="a document to put the table into (default: none)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    given = parser().parse_args(argv)
    began = time.monotonic()
    server.preload()
    with tempfile.TemporaryDirectory(prefix="attack-") as place, _own_environment(Path(place)):
        cases, remarks = _cases(given, Path(place))
        counts, faults, left = _attack(given, cases, Path(place), began)
    told = _told(given, time.monotonic() - began, [*remarks, *left])
    print("\n".join(["", table(counts), "", *told]))
    if given.output and not given.only:
        write_table(given.output, [table(counts), *told])
    return 1 if faults or left else 0


@contextmanager
def _own_environment(place: Path) -> Iterator[None]:
    """Nothing of the user's is read or written: no cache, no network."""
    before = dict(os.environ)
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _cases(given: argparse.Namespace, place: Path) -> tuple[list[Case], list[str]]:
    """The cases, the slow ones first, and what is to be said of those left out."""
    remarks = []
    cases: list[Case] = [*writers_cases(given.writers, given.seed), *kill_cases(given.kills, given.seed)]
    if may_mount(place / "mounted"):
        cases += disk_cases(given.disks, given.seed)
    else:
        remarks.append("No disk was filled: this user may not mount one.")
    cases += contradiction_cases() if given.contradictions else []
    cases += file_cases(_targets(place / "first"), given.files, given.seed) if given.files else []
    if given.only:
        cases = [case for case in cases if case.name.startswith(given.only)]
    return cases, remarks


def _targets(place: Path) -> list[Target]:
    """Every file that a scene reads, found in a room."""
    room, found = Room(place), []
    for scene in SCENES:
        room.reset(scene)
        for file in files_of(scene, room.folder):
            found.append(Target(scene.name, file, (room.folder / file).read_bytes(), scene.nodes))
    shutil.rmtree(place)
    return found


def _attack(
    given: argparse.Namespace, cases: list[Case], place: Path, began: float
) -> tuple[dict[str, Counter], list[str], list[str]]:
    """What came of the cases, by row; a text for each fault; a remark if time ran out."""
    counts = {row: Counter() for row in _ROWS if row in set(map(row_of, cases))}
    faults, left = [], []
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(given.workers, mp_context=fork, initializer=_enter, initargs=(place,)) as pool:
        running = [pool.submit(_attempt, case) for case in cases]  # all workers are forked before any thread starts
        for done in tqdm(as_completed(running), total=len(cases), desc="attack", unit="case", dynamic_ncols=True):
            case, verdict = done.result()
            counts[row_of(case)][verdict.column] += 1
            if verdict.column not in RIGHT:
                alone = f"{_command(given)} --only '{case.name}'"
                faults.append(f"{case}\n  {verdict.column.value}: {verdict.told}\n  alone: {alone}")
                tqdm.write(f"\n{faults[-1]}", file=sys.stderr)
            if time.monotonic() - began > given.minutes * 60:
                tried = sum(map(Counter.total, counts.values()))
                left.append(f"Time ran out: {tried} of {len(cases)} cases were tried.")
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return counts, faults, left


def _command(given: argparse.Namespace) -> str:
    numbers = (
        (name, getattr(given, name)) for name in ("seed", "files", "kills", "disks", "writers", "contradictions")
    )
    return "python tests/attack" + "".join(f" --{name} {value}" for name, value in numbers)


def _enter(place: Path) -> None:
    """Make a worker's room; the server's imports are there already."""
    global _room
    _room = Room(place / f"room-{os.getpid()}")


def _attempt(case: Case) -> tuple[Case, Verdict]:
    try:
        return case, _ATTACKS[type(case)](_room, case)
    except Exception as error:  # of the campaign itself, which must not pass for a case that was borne
        return case, Verdict(Column.OTHERWISE, f"the campaign failed: {type(error).__name__}: {error}")


def _told(given: argparse.Namespace, seconds: float, remarks: Sequence[str]) -> list[str]:
    made = (
        f"mistral-prune-lora {VERSION}, `{_command(given)}`: {seconds / 60:.1f} minutes with {given.workers} processes."
    )
    return [made, *remarks]
