"""Where a result is written until it is whole: held while it is at work, swept when nobody holds it, refused early."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage import scratch
from mistral_prune_lora.storage.transaction import atomic_directory, atomic_file, check_place

# Begins to write, says so, and waits to be told to end.
WRITER = """
import sys
from mistral_prune_lora.storage.transaction import atomic_directory, atomic_file
write = {"directory": atomic_directory, "file": atomic_file}[sys.argv[1]]
with write(sys.argv[2]) as fresh:
    (fresh / "config.json" if fresh.is_dir() else fresh).write_text("half")
    print(fresh, flush=True)
    sys.stdin.readline()
"""
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A former result."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    return tmp_path / "out"


def begin(target: Path, *before: str, kind: str = "directory") -> tuple[subprocess.Popen, Path]:
    """A process that writes a result, and where."""
    command = [*before, sys.executable, "-c", WRITER, kind, str(target)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen) -> None:
    process.communicate("go on\n", timeout=60)
    assert process.returncode == 0


def write(target: Path, content: str = "new") -> None:
    with atomic_directory(target) as fresh:
        (fresh / "config.json").write_text(content)


@pytest.fixture
def in_namespace() -> tuple[str, ...]:
    """A command's prefix that runs it with process numbers of its own, as a container does."""
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user may not make a namespace of process numbers")
    return NAMESPACE


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(kind, out, tmp_path):
    target = out if kind == "directory" else tmp_path / "table.csv"
    killed, left = begin(target, kind=kind)
    killed.kill()
    killed.wait()
    assert left.exists()
    living, at_work = begin(target, kind=kind)
    assert not left.exists() and at_work.exists()
    write(target) if kind == "directory" else write_file(target)
    assert at_work.exists()
    end(living)
    assert ((target / "config.json") if kind == "directory" else target).read_text() == "half"
    assert sorted(os.listdir(tmp_path)) == sorted({"out", target.name})


def write_file(target: Path) -> None:
    with atomic_file(target) as fresh:
        fresh.write_text("new")


def test_a_kill_while_a_place_is_checked_leaves_nothing_for_good(tmp_path):
    """Nothing may ever be written under the name that is asked for: the check itself removes what a killed one left."""
    killed, left = begin(tmp_path / "activations", kind="file")
    killed.kill()
    killed.wait()
    assert left.exists()
    check_place(tmp_path / "activations", directory=False)
    assert os.listdir(tmp_path) == []


def test_two_writers_in_one_process(out):
    with atomic_directory(out) as first, atomic_directory(out) as second:
        assert first.is_dir()
        (second / "config.json").write_text("second")
        (first / "config.json").write_text("first")
    assert (out / "config.json").read_text() == "first", "it ended last"


def test_a_neighbour_with_other_process_numbers_is_left_alone(out, in_namespace):
    """Two containers on one disk: neither sees the other's processes, both see the other's folders."""
    with atomic_directory(out) as fresh:
        (fresh / "config.json").write_text("mine")
        neighbour, theirs = begin(out, *in_namespace)
        end(neighbour)
        assert (out / "config.json").read_text() == "half", "theirs"
        assert (fresh / "config.json").read_text() == "mine"
        neighbour, theirs = begin(out, *in_namespace)
        write(out)
        assert theirs.exists()
        end(neighbour)
    assert (out / "config.json").read_text() == "mine"
    assert os.listdir(out.parent) == ["out"]


def test_what_the_first_process_of_a_container_left_is_removed(out, in_namespace):
    """Its number is 1, and a process 1 lives everywhere."""
    killed, left = begin(out, *in_namespace)
    killed.kill()
    assert killed.stdout.read() == "", "its child has ended too"
    assert left.exists()
    write(out)
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("pid", ["1", "dead", "mine"])
@pytest.mark.parametrize("kind", ["new", "old"])
def test_leftovers_of_the_former_naming_are_removed(kind, pid, out):
    number = {"1": 1, "dead": dead_pid(), "mine": os.getpid()}[pid]
    left = out.with_name(f".out.{kind}-{number}-abc")
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (out.parent / f".out.new-{number}-abc.csv").write_text("half")
    write(out)
    assert os.listdir(out.parent) == ["out"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_kill_between_two_renames_is_mended(out):
    for former in (True, False):
        if former:
            os.rename(out, out.with_name(f".out.old-{dead_pid()}-abc"))
        else:
            left = out.with_name(".out.new-abcd_123")
            (left / "new/out").mkdir(parents=True)
            os.rename(out, left / "old")
        with pytest.raises(ValueError, match="again"), atomic_directory(out):
            raise ValueError("killed again")
        assert (out / "config.json").read_text() == "old"
        assert os.listdir(out.parent) == ["out"]


def test_what_only_looks_like_a_leftover_stays(out, tmp_path):
    others = [".out2.new-abcd_123", ".out.new-abcd_1234", ".out.new-mine", ".out.newer", ".out.new-abcdefgh"]
    for other in others:
        (tmp_path / other).mkdir()
        (tmp_path / other / "thesis.docx").write_text("years of work")
    (tmp_path / ".out.new-12345678").write_text("a file")
    (tmp_path / ".out.new-linked_1").symlink_to(tmp_path / others[0])
    write(out)
    assert all((tmp_path / other / "thesis.docx").exists() for other in others)
    assert len(os.listdir(tmp_path)) == 1 + len(others) + 2


def test_whoever_locks_first_has_the_folder(out, monkeypatch):
    """A sweeper may come between the making of a folder and its lock: the folder is its, and another is made."""
    make, swept = scratch.tempfile.mkdtemp, []

    def swept_at_once(**names):
        folder = make(**names)
        if not swept:
            swept.append(Path(folder))
            for leftover in scratch.leftovers(out):
                leftover.discard()
        return folder

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", swept_at_once)
    with atomic_directory(out) as fresh:
        assert swept and not swept[0].exists()
        assert fresh.is_dir() and swept[0] not in fresh.parents
        assert not list(scratch.leftovers(out)), "the second one is held"


def test_a_folder_that_is_being_swept_is_not_taken(out, monkeypatch):
    """The other order: the sweeper holds the lock when the owner asks for it."""
    make, held = scratch.tempfile.mkdtemp, []

    def held_at_once(**names):
        folder = make(**names)
        if not held:
            held.append(scratch.take(Path(folder), out))
        return folder

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", held_at_once)
    with atomic_directory(out) as fresh:
        assert held[0].folder not in fresh.parents
    held[0].discard()
    assert os.listdir(out.parent) == ["out"]


def test_without_locks_leftovers_are_named_and_stay(out, monkeypatch, capsys):
    killed, left = begin(out)
    killed.kill()
    killed.wait()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    former = out.with_name(f".out.new-{dead_pid()}-abc")
    former.mkdir()
    write(out)
    assert left.is_dir() and former.is_dir()
    assert (out / "config.json").read_text() == "new"
    told = capsys.readouterr().err
    assert f"{left.parents[1]} may be left over from a run that was killed" in told and told.count("\n") == 1


def test_a_mount_point_is_refused_before_the_work(tmp_path, mount):
    (tmp_path / "source").mkdir()
    inner = mount(tmp_path / "holder/with space", "-t", "tmpfs", "none")
    # Of the same file system: its device number tells nothing.
    bound = mount(tmp_path / "bound", "--bind", str(tmp_path / "source"))
    for target, reason in ((inner, "it is a mount point"), (bound, "it is a mount point"), (inner.parent, "holds a")):
        with pytest.raises(PipelineError, match=reason), atomic_directory(target):
            raise AssertionError("must not come here")
    write(inner / "out")
    write(bound / "out")
    assert sorted(os.listdir(tmp_path)) == ["bound", "holder", "source"]


def test_a_read_only_disk_is_refused_before_the_work(tmp_path, mount):
    mount(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "none")
    for target in ("disk/out", "disk/deep/out"):
        with pytest.raises(PipelineError, match="cannot be written: Read-only file system"):
            check_place(tmp_path / target)
        with pytest.raises(PipelineError, match="Read-only"), atomic_file(tmp_path / target):
            raise AssertionError("must not come here")


# As an ordinary user, since root may write anywhere.
ASKER = """
import os, sys
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage.transaction import check_place
if os.geteuid() == 0:
    os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
for place in sys.argv[1:]:
    try:
        check_place(place)
    except PipelineError as error:
        print(error.what)
"""


def test_permissions_are_asked_before_the_work():
    with tempfile.TemporaryDirectory() as name:  # not pytest's folder, which is closed to other users
        shared = Path(name)
        for place, mode in (("closed", 0o555), ("hidden", 0o600), ("open", 0o777), ("open/out", 0o555), (".", 0o755)):
            (shared / place).mkdir(exist_ok=True)
            os.chmod(shared / place, mode)
        places = [str(shared / place) for place in ("closed/out", "hidden/out", "open/out", "open/other")]
        done = subprocess.run([sys.executable, "-c", ASKER, *places], capture_output=True, text=True)
        assert done.stdout.splitlines() == [
            "cannot be written: Permission denied",
            "cannot be written: Permission denied",
            "is write-protected",
        ], done.stderr
        assert os.listdir(shared / "open") == ["out"]
        os.chmod(shared / "hidden", 0o700)


def test_a_target_that_becomes_a_mount_point_keeps_the_work(out, mount):
    """The end fails although everything was asked before: nothing is lost, and a later run leaves it alone."""
    with (
        pytest.raises(PipelineError, match="finished but cannot be put in place") as caught,
        atomic_directory(out) as fresh,
    ):
        (fresh / "config.json").write_text("new")
        mount(out, "-t", "tmpfs", "none")
    (kept,) = [path for path in out.parent.iterdir() if path != out]
    assert f"{kept} is to become {out}" in str(caught.value)
    assert (kept / "config.json").read_text() == "new"


@pytest.mark.parametrize("read_only", [False, True])
def test_work_that_cannot_even_be_renamed_is_kept_in_its_folder(out, read_only, monkeypatch):
    """Where the parent no longer lets us write, a later run knows it by a mark; where nothing does, the error says."""
    reason = OSError(errno.EROFS, "Read-only file system")

    def refused(*_):
        raise reason

    with (
        monkeypatch.context() as patch,
        pytest.raises(PipelineError, match="Read-only file system") as caught,
        atomic_directory(out) as fresh,
    ):
        (fresh / "config.json").write_text("new")
        patch.setattr("mistral_prune_lora.storage.transaction._exchange", refused)
        patch.setattr(os, "rename", refused)
        if read_only:
            patch.setattr(Path, "touch", refused)
    limit = " (until the next run)" if read_only else ""
    assert f"{fresh}{limit} is to become {out}" in str(caught.value)
    assert (fresh / "config.json").read_text() == "new"
    write(out, "later")
    assert fresh.exists() != read_only


def test_signals_that_end_a_process_leave_nothing_for_ever(out):
    for number in (signal.SIGTERM, signal.SIGKILL):
        process, left = begin(out)
        process.send_signal(number)
        process.wait()
        assert left.exists()
    write(out)
    assert os.listdir(out.parent) == ["out"]
