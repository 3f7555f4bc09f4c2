"""Hostile files: one file of those that a command reads is spoilt, and the command is run."""

from __future__ import annotations

from pathlib import Path

from attack.classify import Column, Verdict, content_of, difference, leftovers, of_ending, snapshot
from attack.edits import spoilt
from attack.meaning import is_sound, not_finite, numbers_of
from attack.room import Room
from attack.scenes import SCENES, Scene
from attack.strategies import FileCase

_BY_NAME = {scene.name: scene for scene in SCENES}


def attack_file(room: Room, case: FileCase) -> Verdict:
    """Spoil a file, run its scene, and judge what came of it."""
    scene = _BY_NAME[case.scene]
    valid = room.valid(scene)
    room.reset(scene)
    path = room.folder / case.file
    bytes_before = path.read_bytes()
    with spoilt(path, case.spoiling, room.folder / "aside"):
        inputs, out = _inputs(room, case, path), snapshot(room.out)
        ended = room.run(scene.run)
        lost = difference(inputs, snapshot(room.inputs))
        if lost:
            return Verdict(Column.LOST, f"inputs: {lost}")
        verdict = of_ending(ended) or _of_result(room, case, valid, bytes_before, path)
        if verdict.column is Column.REFUSED:
            return _of_refusal(room, scene, out) or verdict
        return verdict


def _inputs(room: Room, case: FileCase, path: Path) -> dict[str, object]:
    """A snapshot of the inputs, of which one file is another now."""
    name = case.file.removeprefix("inputs/")
    if name == case.file:
        return room.before
    told = {**room.before, name: content_of(path)}
    return {name: content for name, content in told.items() if content is not None}


def _of_refusal(room: Room, scene: Scene, before: dict[str, object]) -> Verdict | None:
    """What is wrong with what a refused command has left; None if all is as it was."""
    after = snapshot(room.out)
    for works in scene.works_in:
        before, after = ({n: c for n, c in told.items() if not _in(n, works)} for told in (before, after))
    gone = difference(before, {name: content for name, content in after.items() if name in before})
    if gone:
        return Verdict(Column.LOST, gone)
    new = difference(before, after)
    return Verdict(Column.LEFT, new) if new else None


def _in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def _of_result(room: Room, case: FileCase, valid: dict[str, object], former: bytes, path: Path) -> Verdict:
    """The verdict on the result of a command that says that all went well."""
    found = numbers_of(room.out)
    no_number = not_finite(room.out)
    if no_number:
        return Verdict(Column.WRONG, f"{no_number} is not finite")
    if leftovers(room.out):
        return Verdict(Column.LEFT, f"{leftovers(room.out)}")
    if found == valid:
        return Verdict(Column.SAME)
    if path.exists() and is_sound(case.kind, case.spoiling, former, path, room.out):
        return Verdict(Column.TAKEN)
    return Verdict(Column.WRONG, "another result than of the whole file")
