"""A folder of one's own in which commands are run, one after another, each from the same state."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from attack.classify import snapshot
from attack.meaning import numbers_of
from attack.project import write_project
from attack.row_edits import load_tables
from attack.scenes import Scene, prepare
from attack.server import Child, Ended

PATIENCE = 90  # seconds after which nobody would wait any longer; the slowest command takes one


class Room:
    """W of project.py, and what the commands give there when nothing is spoilt."""

    def __init__(self, folder: Path) -> None:
        """Make the project in a new folder, in a child."""
        self.folder, self.inputs, self.out = folder, folder / "inputs", folder / "out"
        self._found: dict[Hashable, object] = {}
        for name in ("aside", "home", "states"):
            (folder / name).mkdir(parents=True)
        self.must("the project", lambda: write_project(folder))
        load_tables(folder / "tables")
        self.before = snapshot(self.inputs)

    def start(self, work: Callable[[], int | None], log: str = "log") -> Child:
        """Start some work in the working directory."""
        home = str(self.folder / "home")
        environment = {"HOME": home, "XDG_CACHE_HOME": f"{home}/cache", "TMPDIR": home, "PIP_NO_INDEX": "1"}
        place = self.inputs if self.inputs.is_dir() else self.folder
        return Child(work, place, self.folder / log, environment)

    def run(self, work: Callable[[], int | None]) -> Ended | None:
        """Run some work to its end; None if there is none."""
        child = self.start(work)
        ended = child.wait(PATIENCE)
        if ended is None:
            child.kill()
        return ended

    def reset(self, scene: Scene) -> None:
        """Put `out` into the state in which a scene begins."""
        self.clear()
        if not scene.prepare:
            self.out.mkdir()
            return
        state = self.folder / "states" / scene.name
        if not state.exists():
            self.out.mkdir()
            self.must(scene.name, lambda: prepare(scene))
            self.out.rename(state)
        shutil.copytree(state, self.out, symlinks=True)

    def clear(self) -> None:
        """Remove what a command has written and kept."""
        for folder in (self.out, self.folder / "home"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "home").mkdir()

    def valid(self, scene: Scene) -> dict[str, object]:
        """The numbers and weights that a scene gives when nothing is spoilt."""

        def find() -> dict[str, object]:
            self.reset(scene)
            self.must(scene.name, scene.run)
            return numbers_of(self.out)

        return self.once(("valid", scene.name), find)

    def once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What something comes to here, found out at the first time that it is asked for."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def must(self, name: str, work: Callable[[], int | None]) -> None:
        """Run some work that has to succeed."""
        ended = self.run(work)
        if ended is None or ended.code != 0:
            raise RuntimeError(f"{name} does not even run undisturbed: {ended}")
