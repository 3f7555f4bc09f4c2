"""A pruning that is killed over a former one leaves that or the new one, or what the next run makes whole: no mix."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cut_model import save_dense
from output_project import snapshot
from tiny import save_tokenizer

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.storage import scratch, transaction
from mistral_prune_lora.storage.transaction import atomic_directories

LAYOUTS = [Layout(8, (3, 4), (5, 6)), Layout(8, (2, 3), (4, 5))]
PARTS = ("bundles/B", "bundles/C", "A")
TRIALS = 16


class Stop(Exception):
    """A run that ends right after it has begun."""


def prune(dense: Path, out: Path, layout: Layout) -> None:
    prune_model(dense, layout, save_dir=out / "A", save_removed_dir=out / "bundles")


def mend(out: Path) -> None:
    """What the next run does first."""
    with suppress(Stop), atomic_directories([out / part for part in PARTS]):
        raise Stop


def parts(out: Path) -> list[dict | None]:
    """Every file of every part; None for a part that is not there. The log's paths and times are the same in all."""
    return [snapshot(out / part) if (out / part).is_dir() else None for part in PARTS]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "dense"
    save_dense(folder, vocab_size=259, hidden_size=128, intermediate_size=512)
    save_tokenizer(folder)
    return folder


def child(work: Callable[[], None]) -> int:
    """The number of a fork of this process that does some work: nothing is imported again."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return pid


def was_killed(pid: int) -> bool:
    """Wait for a fork, which must not have failed."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at(monkeypatch, place: object, name: str, number: int) -> None:
    """Let the n-th call of a function kill the process that calls it."""
    function, calls = getattr(place, name), []

    def call(*args, **options):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    monkeypatch.setattr(place, name, call)


def two_results(dense: Path, out: Path) -> list[list]:
    results = []
    for layout in reversed(LAYOUTS):
        prune(dense, out, layout)
        results.insert(0, parts(out))
    assert all(old != new for old, new in zip(*results, strict=True))
    return results


def check_mended(out: Path, results: list[list], *, may_be_away: bool) -> tuple[list, list]:
    """The parts after a kill and after the next run's first steps, neither of which may hold half a part."""
    before = parts(out)
    for part, old, new in zip(before, *results, strict=True):
        assert part in (old, new) or (may_be_away and part is None)
    mend(out)
    assert sorted(os.listdir(out) + os.listdir(out / "bundles")) == ["A", "B", "C", "bundles"]
    return before, parts(out)


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch) -> str:
    """Both ways to put a directory in place."""
    if request.param == "two renames":
        monkeypatch.setattr(transaction, "_exchange", lambda first, second: False)
    return request.param


def test_killed_at_any_moment(renames, dense, tmp_path):
    results, killed = two_results(dense, tmp_path), 0
    began = time.monotonic()
    assert not was_killed(child(lambda: prune(dense, tmp_path, LAYOUTS[1])))
    usual = time.monotonic() - began
    for trial in range(TRIALS):
        pid = child(lambda layout=LAYOUTS[trial % 2]: prune(dense, tmp_path, layout))
        time.sleep(random.Random(trial).uniform(0, 1.1) * usual)
        os.kill(pid, signal.SIGKILL)
        killed += was_killed(pid)
        _, after = check_mended(tmp_path, results, may_be_away=renames == "two renames")
        assert after in results, "no mixture"
    assert killed >= TRIALS / 4


def test_killed_between_two_parts_the_next_run_puts_the_rest_in_place(renames, dense, tmp_path, monkeypatch):
    results, mixed = two_results(dense, tmp_path), 0
    place, name, steps = (transaction, "_exchange", 3) if renames == "exchange" else (os, "rename", 6)
    for number in range(1, steps + 2):
        prune(dense, tmp_path, LAYOUTS[0])
        with monkeypatch.context() as patch:
            kill_at(patch, place, name, number)
            assert was_killed(child(lambda: prune(dense, tmp_path, LAYOUTS[1]))) == (number <= steps)
        before, after = check_mended(tmp_path, results, may_be_away=renames == "two renames")
        mixed += before not in results
        assert after == results[1]
    assert mixed == steps - 1, "what the kills left without the next run"


def test_killed_while_the_former_parts_are_cleared_away(dense, tmp_path, monkeypatch):
    results = two_results(dense, tmp_path)
    for number in (1, 2, 3):
        prune(dense, tmp_path, LAYOUTS[0])
        with monkeypatch.context() as patch:
            kill_at(patch, scratch.shutil, "rmtree", number)
            assert was_killed(child(lambda: prune(dense, tmp_path, LAYOUTS[1])))
        before, after = check_mended(tmp_path, results, may_be_away=False)
        assert before == after == results[1]


def killed_after_the_first(dense: Path, out: Path, monkeypatch) -> None:
    """A pruning over a former one that was killed when B was in place."""
    prune(dense, out, LAYOUTS[0])
    with monkeypatch.context() as patch:
        kill_at(patch, transaction, "_exchange", 2)
        assert was_killed(child(lambda: prune(dense, out, LAYOUTS[1])))


def test_what_a_user_has_put_there_meanwhile_is_left_alone(dense, tmp_path, monkeypatch):
    """The rest of a killed run goes only where what it was to replace still is, or nothing."""
    results = two_results(dense, tmp_path)
    killed_after_the_first(dense, tmp_path, monkeypatch)
    os.rename(tmp_path / "A", tmp_path / "mine")
    (tmp_path / "A").mkdir()
    for place in ("A", "bundles/C"):
        (tmp_path / place / "thesis.txt").write_text("years of work")
    mend(tmp_path)
    assert os.listdir(tmp_path / "A") == ["thesis.txt"] and (tmp_path / "bundles/C/thesis.txt").exists()
    assert parts(tmp_path)[0] == results[1][0], "put in place before"
    assert sorted(os.listdir(tmp_path)) == ["A", "bundles", "mine"]
    assert sorted(os.listdir(tmp_path / "bundles")) == ["B", "C"]


def test_a_disk_under_another_path_is_mended_too(dense, tmp_path, monkeypatch):
    """Another container, or another machine, sees the same disk elsewhere."""
    results = two_results(dense, tmp_path / "disk")
    killed_after_the_first(dense, tmp_path / "disk", monkeypatch)
    os.rename(tmp_path / "disk", tmp_path / "elsewhere")
    mend(tmp_path / "elsewhere")
    new = parts(tmp_path / "elsewhere")
    assert new[:2] == results[1][:2]
    assert new[2].keys() == results[1][2].keys()
    assert new[2]["model.safetensors"] == results[1][2]["model.safetensors"]


def test_a_note_that_cannot_be_read_is_none(dense, tmp_path, monkeypatch):
    """Notes are complete on disk before anything is put in place; half a one means that nothing was."""
    results = two_results(dense, tmp_path)
    killed_after_the_first(dense, tmp_path, monkeypatch)
    journals = sorted(tmp_path.rglob(".*.new-*/journal"))
    assert len(journals) == 3
    for content in ("", '[{"folder": 3}]', "{}", "[]"):
        for journal in journals:
            if journal.exists():
                journal.write_text(content)
        before = parts(tmp_path)
        mend(tmp_path)
        assert parts(tmp_path) == before
    assert before[0] == results[1][0], "put in place before"
    assert sorted(os.listdir(tmp_path) + os.listdir(tmp_path / "bundles")) == ["A", "B", "C", "bundles"]
