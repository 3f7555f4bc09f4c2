"""What is expensive to make is made once, by whichever process of a run of tests comes first."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> tuple[Path, object]:
    """A folder that several processes of pytest-xdist share, and what was told of it. Not to be changed.

    Args:
        factory: pytest's own.
        name: the folder's.
        make: fills the folder, which is empty; returns what is to be told, as JSON.
    """
    place = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # above the folders of the workers; of a lone process, that is what all runs share
    folder, told = place / name, place / f"{name}.json"
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go with the file, whatever happens to the process
        if not told.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed half-way
            folder.mkdir()
            told.write_text(json.dumps(make(folder)))
    return folder, json.loads(told.read_text())
