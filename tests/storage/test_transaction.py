"""A result appears whole under its name, or what was there before stays."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage import transaction
from mistral_prune_lora.storage.transaction import (
    atomic_directories,
    atomic_directory,
    atomic_file,
    check_place,
    scratch_directory,
)


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request, monkeypatch):
    """Both ways to put a directory in place."""
    if request.param == "two renames":
        monkeypatch.setattr(transaction, "_exchange", lambda first, second: False)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A former result."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    (tmp_path / "out/manifest.json").write_text("old")
    return tmp_path / "out"


def test_a_new_directory_appears_at_the_end(tmp_path, renaming):
    with atomic_directory(tmp_path / "deep/out") as fresh:
        (fresh / "config.json").write_text("new")
        assert not (tmp_path / "deep/out").exists()
    assert (tmp_path / "deep/out/config.json").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_former_directory_is_replaced_whole(old, renaming):
    with atomic_directory(old) as fresh:
        (fresh / "config.json").write_text("new")
        assert (old / "config.json").read_text() == "old"
    assert os.listdir(old) == ["config.json"]
    assert (old / "config.json").read_text() == "new"
    assert os.listdir(old.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(old, error, renaming):
    with pytest.raises(error), atomic_directory(old) as fresh:
        (fresh / "config.json").write_text("new")
        raise error
    assert (old / "config.json").read_text() == "old"
    assert os.listdir(old.parent) == ["out"]


def test_directories_are_exchanged_in_one_step(old, tmp_path):
    (tmp_path / "other").mkdir()
    assert transaction._exchange(tmp_path / "other", old)
    assert os.listdir(old) == []
    assert sorted(os.listdir(tmp_path / "other")) == ["config.json", "manifest.json"]


@pytest.mark.parametrize("missing", ["library", "function"])
def test_without_renameat2_the_two_renames_are_used(old, missing, monkeypatch):
    def no_library(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(transaction.ctypes, "CDLL", no_library if missing == "library" else lambda *a, **k: object())
    with atomic_directory(old) as fresh:
        (fresh / "config.json").write_text("new")
    assert (old / "config.json").read_text() == "new"


def test_an_exchange_that_fails_for_another_reason_is_an_error(old, tmp_path):
    with pytest.raises(OSError, match="No such file"):
        transaction._exchange(tmp_path / "missing", old)


def test_permissions_are_those_of_any_new_directory(tmp_path):
    os.chmod(tmp_path, 0o2755)  # a group's directory, whose group everything in it shall have
    with atomic_directory(tmp_path / "out") as fresh:
        (fresh / "config.json").write_text("new")
    (tmp_path / "plain").mkdir()
    with atomic_file(tmp_path / "file.txt") as fresh:
        fresh.write_text("new")
    (tmp_path / "plain.txt").write_text("")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_of_a_link_what_it_leads_to_is_replaced(old, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "elsewhere/link", tmp_path / "elsewhere/file"
    link.symlink_to(old)
    file.symlink_to(tmp_path / "table.csv")
    with atomic_directory(link) as fresh, atomic_file(file) as fresh_file:
        (fresh / "config.json").write_text("new")
        fresh_file.write_text("new")
    assert link.is_symlink() and file.is_symlink()
    assert (old / "config.json").read_text() == (tmp_path / "table.csv").read_text() == "new"
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["file", "link"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out", "table.csv"]


def test_a_file_is_replaced_at_the_end(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")
    with atomic_file(target) as fresh:
        assert fresh.suffix == ".csv", "writers choose the format by it"
        fresh.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_an_exception_leaves_the_former_file(tmp_path):
    (tmp_path / "table.csv").write_text("old")
    with pytest.raises(ValueError, match="no"), atomic_file(tmp_path / "table.csv") as fresh:
        fresh.write_text("new")
        raise ValueError("no")
    assert (tmp_path / "table.csv").read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_directory_for_work_is_gone_when_the_work_ends(tmp_path, error):
    with contextlib.suppress(error or ()), scratch_directory(tmp_path / "table.csv") as folder:
        (folder / "part").write_text("half")
        with atomic_file(tmp_path / "table.csv") as fresh:
            fresh.write_text("whole")
        assert (folder / "part").exists()
        if error:
            raise error
    assert os.listdir(tmp_path) == ["table.csv"]


def test_several_directories_appear_together(old, tmp_path, renaming):
    with atomic_directories([tmp_path / "bundles/B", old]) as (b, out):
        (b / "layer").write_text("new")
        (out / "config.json").write_text("new")
        assert not (tmp_path / "bundles/B").exists() and (old / "config.json").read_text() == "old"
    assert (tmp_path / "bundles/B/layer").read_text() == (old / "config.json").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["bundles", "out"] and os.listdir(tmp_path / "bundles") == ["B"]


def test_a_check_at_the_end_has_the_last_word(old):
    """Hours have passed since the first one; what stands there now may be another's."""

    def check():
        if (old / "thesis.docx").exists():
            raise PipelineError("holds files of somebody", where=old)

    with (
        pytest.raises(PipelineError, match="cannot be put in place: holds files of somebody") as caught,
        atomic_directory(old, check=check) as fresh,
    ):
        (fresh / "config.json").write_text("new")
        (old / "thesis.docx").write_text("years of work")
    assert (old / "thesis.docx").is_file()
    kept = the_one_kept(old)
    assert (kept / "config.json").read_text() == "new"
    assert f"moved by hand: {kept} is to become {old}" in str(caught.value)


def the_one_kept(target: Path) -> Path:
    """Where the finished result lies, which a later run with the same target leaves alone."""
    (kept,) = [path for path in target.parent.iterdir() if ".finished-" in path.name]
    with pytest.raises(ValueError, match="again"), atomic_directory(target):
        raise ValueError("again")
    assert kept.exists()
    return kept


def failing(monkeypatch, which: int) -> None:
    """Let the n-th attempt to put something in place fail."""
    rename, count = os.rename, []

    def rename_or_fail(source, target):
        if Path(source).parent.name == "new" and ".finished-" not in str(target):
            count.append(target)
            if len(count) == which:
                raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(transaction, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", rename_or_fail)


def test_a_rename_that_fails_puts_the_former_one_back_and_keeps_the_new_one(old, monkeypatch):
    failing(monkeypatch, 1)
    with (
        pytest.raises(PipelineError, match="finished but cannot be put in place: Input/output error"),
        atomic_directory(old) as fresh,
    ):
        (fresh / "config.json").write_text("new")
    assert (old / "config.json").read_text() == "old"
    assert (the_one_kept(old) / "config.json").read_text() == "new"


@pytest.mark.parametrize("which", [1, 2, 3])
def test_of_several_none_is_put_in_place_if_one_cannot_be(which, tmp_path, monkeypatch, capsys):
    targets = [tmp_path / name for name in ("B", "C", "A")]
    for target in targets[1:]:  # B is new
        target.mkdir()
        (target / "file").write_text("old")
    failing(monkeypatch, which)
    with (
        pytest.raises(PipelineError, match="finished but cannot be put in place"),
        atomic_directories(targets) as fresh,
    ):
        for folder in fresh:
            (folder / "file").write_text("new")
    assert not targets[0].exists()
    assert all((target / "file").read_text() == "old" for target in targets[1:])
    kept = sorted(path for path in tmp_path.iterdir() if path not in targets)
    assert [path.name.split(".")[0] for path in kept] == ["A", "B", "C"]
    told = capsys.readouterr().err
    assert all((path / "file").read_text() == "new" and f"kept: {path} " in told for path in kept)


def test_an_interrupt_between_two_of_several_undoes_the_first(tmp_path, monkeypatch):
    exchange, targets = transaction._exchange, [tmp_path / "B", tmp_path / "A"]
    for target in targets:
        target.mkdir()
        (target / "file").write_text("old")

    def interrupted(first, second):
        if second == targets[1]:
            raise KeyboardInterrupt
        return exchange(first, second)

    monkeypatch.setattr(transaction, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directories(targets) as fresh:
        for folder in fresh:
            (folder / "file").write_text("new")
    assert [(target / "file").read_text() for target in targets] == ["old", "old"]
    assert sorted(os.listdir(tmp_path)) == ["A", "B"]


def test_a_file_that_cannot_be_put_in_place_is_kept(tmp_path):
    target = tmp_path / "table.csv"
    with pytest.raises(PipelineError, match="Is a directory"), atomic_file(target) as fresh:
        fresh.write_text("new")
        target.mkdir()
    (kept,) = [path for path in tmp_path.iterdir() if path != target]
    assert kept.suffix == ".csv" and kept.read_text() == "new"


def test_a_full_disk_is_one_line(old):
    with (
        pytest.raises(PipelineError, match="the result cannot be written: No space left on device"),
        atomic_directory(old),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(old.parent) == ["out"]


@pytest.mark.parametrize("length", [1, 100, 143, 200, 255])
def test_any_name_that_the_file_system_takes(length, tmp_path):
    name = ("é" * 200).encode()[: length // 2 * 2].decode() + "x" * (length % 2)
    for _ in range(2):
        with atomic_directory(tmp_path / "a" / name) as fresh, atomic_file(tmp_path / "b" / name) as file:
            (fresh / "config.json").touch()
            file.write_text("new")
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b") == [name]


def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    long = "x" * 256
    places = {long: "name too long", "file/out": "file is a file, not a directory", f"deep/{long}/out": "name too long"}
    for place, reason in places.items():
        for write in (atomic_directory, atomic_file):
            with pytest.raises(PipelineError, match=reason), write(tmp_path / place):
                raise AssertionError("must not come here")
        with pytest.raises(PipelineError, match=reason):
            check_place(tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


def test_a_question_leaves_nothing_behind(tmp_path):
    check_place(tmp_path / "deep/deeper/out", tmp_path / "other")
    check_place(tmp_path / "deep/table.csv", directory=False)
    assert os.listdir(tmp_path) == []
