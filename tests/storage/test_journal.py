"""Journals: what was appended is read again, and nothing else is believed."""

import errno
import fcntl
import os
import threading
import zlib

import pytest

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage import journal
from mistral_prune_lora.storage.journal import Journal, open_held

HEADER = {"run": "one", "shape": (2, 3)}
ENTRIES = [{"batch": number, "nll": [number + 0.125, 7.25]} for number in range(3)]


@pytest.fixture
def path(tmp_path):
    """A journal of three entries."""
    with Journal(tmp_path / "work/journal", HEADER) as fresh:
        for entry in ENTRIES:
            fresh.append(entry)
    return tmp_path / "work/journal"


def entries(path, header=HEADER):
    with Journal(path, header) as journal:
        return journal.entries


def with_checksum(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def test_entries_come_back_as_they_were(path, capsys):
    before = path.read_bytes()
    assert entries(path) == ENTRIES
    assert path.read_bytes() == before and capsys.readouterr().err == ""


def test_of_another_header_nothing_is_kept(path, capsys):
    assert entries(path, {"run": "two", "shape": (2, 3)}) == []
    assert entries(path) == [] and capsys.readouterr().err == ""


def changed_digit(content: bytes) -> bytes:
    assert content.count(b"1.125") == 1
    return content.replace(b"1.125", b"1.126")


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        (changed_digit, [0, 2]),
        (lambda content: content[:-1], [0, 1]),
        (lambda content: content[:-9] + b"\xff\x00", [0, 1]),
        (lambda content: content + b"\0" * 5000, [0, 1, 2]),
        (lambda content: content + b'{"batch": 9, "nll": [0.0, 0.0]}\n', [0, 1, 2]),
        (lambda content: content + with_checksum(b"[1, 2]"), [0, 1, 2]),
        (lambda content: content + with_checksum(b"[" * 100_000), [0, 1, 2]),
        (lambda content: content + with_checksum(b'{"batch": '), [0, 1, 2]),
    ],
    ids=["digit", "cut", "torn", "zeros", "no checksum", "a list", "deep", "no JSON"],
)
def test_a_line_that_is_not_what_was_written_is_left_out_and_said(path, capsys, spoil, kept):
    path.write_bytes(spoil(path.read_bytes()))
    assert entries(path) == [ENTRIES[i] for i in kept]
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {path}: an entry is not what was written") and said.count("\n") == 1
    # What follows never follows a torn line.
    with Journal(path, HEADER) as journal:
        journal.append({"batch": 7})
    assert entries(path)[-1] == {"batch": 7} and capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"[]\n", b"\xff\xfe\n", b"null\n" * 9, b"\0" * 1000])
def test_what_was_never_a_journal_begins_anew(tmp_path, content):
    (tmp_path / "journal").write_bytes(content)
    assert entries(tmp_path / "journal") == []
    with Journal(tmp_path / "journal", HEADER) as journal:
        journal.append(ENTRIES[0])
    assert entries(tmp_path / "journal") == ENTRIES[:1]


def test_nothing_is_written_through_a_link(path, tmp_path):
    """A link in a folder of work would let its writer choose which of the user's files is emptied."""
    (tmp_path / "precious").write_text("mine")
    path.unlink()
    path.symlink_to(tmp_path / "precious")
    with pytest.raises(PipelineError, match=r"cannot be opened: .*\(in .*journal\)"):
        Journal(path, HEADER)
    assert (tmp_path / "precious").read_text() == "mine"


def test_pipes_directories_and_files_in_the_way_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, told in (
        ("pipe", "is not a regular file"),
        ("folder", "cannot be opened: Is a directory"),
        ("file/journal", "cannot be opened: (File exists|Not a directory)"),
        ("x" * 300, "cannot be opened: File name too long"),
    ):
        with pytest.raises(PipelineError, match=told):
            Journal(tmp_path / name, HEADER)


def test_nan_is_never_written(path):
    with Journal(path, HEADER) as journal, pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"nll": [float("nan")]})
    assert entries(path) == ENTRIES


def test_a_file_system_without_locks_is_no_other_process(path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert entries(path) == ENTRIES


def test_a_journal_that_was_finished_while_it_was_opened_is_not_written_to(path, monkeypatch):
    """Or what is appended would stand in a file that has no name any more."""
    flock = fcntl.flock

    def late(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        return flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(path, HEADER) as journal:
        assert journal.entries == []
        journal.append(ENTRIES[0])
    assert entries(path) == ENTRIES[:1]


def test_a_job_waits_for_one_that_lives_on_after_its_main_process(path, monkeypatch, capsys):
    """A command says that another one is at work; a job of the workflow takes over once that has ended."""
    held = open_held(path, "another one is writing it")
    with pytest.raises(PipelineError, match="another one is writing it"):
        open_held(path, "another one is writing it")
    monkeypatch.setattr(journal, "in_job", lambda: True)
    monkeypatch.setattr(journal, "_LOOK_AGAIN", 0.05)
    threading.Timer(0.3, os.close, [held]).start()
    os.close(open_held(path, "another one is writing it"))
    assert capsys.readouterr().err.count("waiting for it") == 1
