"""A result appears whole under its name, or what was there before stays."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_prune_lora import transaction
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.transaction import atomic_directory, atomic_file, refuse_foreign, scratch_directory


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


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


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


def test_a_rename_that_fails_puts_the_former_one_back(old, monkeypatch):
    rename = os.rename

    def failing(source, target):
        if ".new-" in str(source):
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(transaction, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), atomic_directory(old):
        pass
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
    with atomic_directory(tmp_path / "out") as fresh:
        (fresh / "config.json").write_text("new")
    (tmp_path / "plain").mkdir()
    with atomic_file(tmp_path / "file.txt") as fresh:
        fresh.write_text("new")
    (tmp_path / "plain.txt").write_text("")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_of_a_link_the_directory_behind_it_is_replaced(old, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/link"
    link.symlink_to(old)
    with atomic_directory(link) as fresh:
        (fresh / "config.json").write_text("new")
    assert link.is_symlink()
    assert (old / "config.json").read_text() == "new"
    assert os.listdir(tmp_path / "elsewhere") == ["link"]


def test_files_of_somebody_are_never_replaced(old):
    (old / "thesis.docx").write_text("years of work")
    with pytest.raises(PipelineError, match=r"thesis\.docx"), atomic_directory(old):
        raise AssertionError("must not come here")
    assert (old / "thesis.docx").is_file()


def test_a_file_is_no_output_directory(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(PipelineError, match="is a file"):
        refuse_foreign(tmp_path / "out")


@pytest.mark.parametrize("kind", ["new", "old"])
def test_what_killed_runs_left_is_removed(old, kind):
    for pid in (dead_pid(), os.getpid()):  # ours: in a container, a killed run had the same number
        left = old.with_name(f".out.{kind}-{pid}-abc")
        left.mkdir()
        (left / "model.safetensors").write_text("half")
    with atomic_directory(old) as fresh:
        assert sorted(os.listdir(old.parent)) == [fresh.name, "out"]


def test_what_others_are_writing_is_left_alone(old):
    others = [old.with_name(f".out.new-{os.getppid()}-abc"), old.with_name(f".out2.new-{dead_pid()}-abc")]
    for other in others:
        other.mkdir()
    with atomic_directory(old) as first, atomic_directory(old) as second:
        assert first.is_dir()
        (second / "config.json").write_text("second")
    assert all(other.is_dir() for other in others)


def test_a_kill_between_two_renames_is_mended(old):
    os.rename(old, old.with_name(f".out.old-{dead_pid()}-abc"))
    with pytest.raises(ValueError, match="again"), atomic_directory(old):
        raise ValueError("killed again")
    assert (old / "config.json").read_text() == "old"
    assert os.listdir(old.parent) == ["out"]


def test_a_file_is_replaced_at_the_end(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")
    (tmp_path / f".table.csv.new-{dead_pid()}-abc.csv").write_text("half")
    with atomic_file(target) as fresh:
        assert fresh.suffix == ".csv"
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
    left = tmp_path / f".table.csv.new-{dead_pid()}-x"
    left.mkdir()
    with contextlib.suppress(error or ()), scratch_directory(tmp_path / "table.csv") as folder:
        (folder / "part").write_text("half")
        assert [*tmp_path.iterdir()] == [folder], "what a killed run left is gone"
        with atomic_file(tmp_path / "table.csv") as fresh:
            fresh.write_text("whole")
        assert (folder / "part").exists()
        if error:
            raise error
    assert os.listdir(tmp_path) == ["table.csv"]
