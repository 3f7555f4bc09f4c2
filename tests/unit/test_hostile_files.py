"""Every file that a command reads, spoilt in ways of hostile.py that the seed draws: one line, or the same result."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile import Mutation, mutated, mutations
from output_project import COMMANDS, INPUTS, Command, record, snapshot, write_inputs

SEED = 0
DRAWN = 2  # mutations of a file for each command that reads it; for the slowest, 1
HANGS = 120  # seconds after which nobody would wait any longer
# Read, with what no command can know to be wrong: another text or model is as good.
FREE = (".txt", ".safetensors", ".parquet")


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, error lines and a digest of what it wrote that does not tell time or place."""

    code: int
    errors: list[str]
    printed: str
    wrote: dict[str, object]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Path]:
    """The working directory, with one of everything, which is spoilt and restored."""
    folder = tmp_path_factory.mktemp("hostile")
    write_inputs(folder)
    before, cache = os.getcwd(), os.environ.get("XDG_CACHE_HOME")
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield folder
    os.chdir(before)
    if cache is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = cache


def files_read(command: Command) -> list[Path]:
    """The files of a command's inputs, as paths in the project."""
    folders = [Path(INPUTS[name]) for name in command.reads]
    found = [file for folder in folders for file in (sorted(folder.rglob("*")) if folder.is_dir() else [folder])]
    return [file for file in found if file.is_file() and file.name != "README.md"]


def attempt(command: Command, out: Path) -> Outcome:
    """Run a command with its outputs below `out`."""
    kinds = {"directory": "made", "folder": "work", "file": "made.json", "parts": "parts"}
    flags = {flag: out / f"{flag}_{kinds[kind]}" for flag, kind in command.outputs.items() if flag != "teacher_states"}
    out.mkdir()
    printed = io.StringIO()

    def give_up(*_) -> None:
        raise TimeoutError(f"no end after {HANGS} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANGS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = command.run(**flags)
    finally:
        signal.alarm(0)
    lines = printed.getvalue().splitlines()
    return Outcome(code, [line for line in lines if line.startswith("error: ")], printed.getvalue(), result(out))


def result(out: Path) -> dict[str, object]:
    """The weights and numbers that were written."""
    found: dict[str, object] = {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*.safetensors"))
        if "work_dir" not in file.parts[-2]
    }
    if (out / "json_made.json").is_file():
        found["ppl"] = [entry["ppl"] for entry in record(out / "json_made.json")["results"]]
    return found


def fault(outcome: Outcome, valid: Outcome, file: Path, mutation: Mutation) -> str | None:
    """What is wrong with what a command did with a spoilt file; None if nothing."""
    if "Traceback" in outcome.printed:
        return "a traceback"
    if outcome.code == 0:
        judged = file.suffix not in FREE and " is " not in mutation.name and "without" not in mutation.name
        return "another result" if judged and outcome.wrote != valid.wrote else None
    if outcome.code != 1 or len(outcome.errors) != 1:
        return f"exit code {outcome.code} and {len(outcome.errors)} error lines"
    if len(outcome.errors[0]) > 500 or not outcome.errors[0].isprintable():
        return "an error line that is too long or not printable"
    return "something was written all the same" if any("work" not in name for name in outcome.wrote) else None


@pytest.mark.parametrize("name", COMMANDS)
def test_a_spoilt_file_is_refused_in_one_line(project, tmp_path, name):
    command, draw = COMMANDS[name], random.Random(SEED)
    valid = attempt(command, tmp_path / "valid")
    assert valid.code == 0, valid.printed
    before = snapshot(project)
    faults = []
    for file in files_read(command):
        possible = mutations(file, draw)
        for mutation in draw.sample(possible, 1 if name == "evaluate" else DRAWN):
            what = f"{file}, {mutation.name}"
            with mutated(file, mutation):
                try:
                    outcome = attempt(command, tmp_path / "out")
                    wrong = fault(outcome, valid, file, mutation)
                    told = outcome.printed[-300:]
                except Exception as error:
                    wrong, told = f"a traceback of {type(error).__name__}", str(error)[:300]
            shutil.rmtree(tmp_path / "out")
            if wrong:
                faults.append(f"{what}: {wrong}: {told}")
    assert not faults, "\n".join(faults)
    assert snapshot(project) == before
