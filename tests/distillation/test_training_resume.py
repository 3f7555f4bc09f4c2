"""A training that is killed and started again ends with the bytes of one that was not."""

import errno
import json
import os
import random
import signal
import time
from contextlib import suppress

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from forked import Forked
from training_jobs import train_job

from mistral_prune_lora.distillation.settings import (
    HeldOutSettings,
    LoraSettings,
    LossSettings,
    OptimiserSettings,
)
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.layout.partition import Layout

LAYOUT = Layout(8, (3, 4), (5, 6))
STEPS = 30
FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "training.csv",
    "held_out.csv",
    "training.json",
    "README.md",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    dense = save_dense(folder / "dense", dtype=torch.float32)
    return dense, *cut(dense, LAYOUT, folder, torch.float32)


def job(parts, output, **changes) -> dict:
    """B, with everything that a state must hold: dropout, passes over few windows, the best of several looks."""
    dense, a, bundles = parts
    given = {
        "student_dir": a, "teacher_dir": dense, "bundles": (bundles["B"],), "windows": random_windows(6, 16),
        "output_dir": output, "held_out_windows": random_windows(3, 16, seed=2), "save_steps": 7,
        "dtype": torch.float32,
        "lora": LoraSettings(rank=2, dropout=0.1), "loss": LossSettings(0.5, 2.0),
        "optimiser": OptimiserSettings(STEPS, 1, 2, 1e-2, 5, weight_decay=0.01),
        "held_out": HeldOutSettings(10, "best"),
    }  # fmt: skip
    return given | changes


def run(given: dict) -> int:
    torch.set_num_threads(1)
    train_job("B", **given)
    return 0


def content(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def undisturbed(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "adapter"
    assert Forked(run, job(parts, output.with_name("first"))).wait().code == 0  # the server takes its time to start
    started = time.monotonic()
    assert Forked(run, job(parts, output)).wait().code == 0
    return content(output), time.monotonic() - started


def test_kills_at_random_moments_change_no_byte(parts, undisturbed, tmp_path):
    wanted, seconds = undisturbed
    moments, output = random.Random(7), tmp_path / "adapter"
    ended, beside = [], tmp_path / "adapter.unfinished"
    for number in range(20):
        work = Forked(run, job(parts, output))
        time.sleep(moments.uniform(0.1, 0.7) * seconds)
        with suppress(ProcessLookupError):
            os.kill(work.process.pid, signal.SIGKILL if number % 2 else signal.SIGTERM)
        ended.append(work.wait().code)
        if ended[-1] == 0:  # it was done before
            assert content(output) == wanted and not beside.exists()
            output.rename(tmp_path / f"adapter-{number}")
    assert set(ended) <= {0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM} and len(set(ended)) > 1
    assert Forked(run, job(parts, output)).wait().code == 0
    assert content(output) == wanted and not beside.exists()


def interrupted(given: dict, step: int) -> int:
    """Run until a step is done, and be asked to end then."""
    from mistral_prune_lora.distillation import loop

    tell = loop.Loop._tell

    def told(self, bar, seconds):
        tell(self, bar, seconds)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.Loop._tell = told
    return run(given)


def test_asked_to_end_it_saves_its_state_and_says_how_it_goes_on(parts, undisturbed, tmp_path):
    output, beside = tmp_path / "adapter", tmp_path / "adapter.unfinished"
    ended = Forked(interrupted, job(parts, output, save_steps=0), 23).wait()
    assert ended.code == 128 + signal.SIGTERM and not output.exists()
    assert "ended by SIGTERM after step 23: the same command goes on from there" in ended.err
    assert len((beside / "training.csv").read_text().splitlines()) == 24, "the curve is written as it goes"
    # What B's frozen layers come to is not computed a second time, neither for another pass nor after a kill.
    made = (beside / "prefix.safetensors").stat().st_mtime_ns
    again = Forked(interrupted, job(parts, output, save_steps=0), 24).wait()
    assert again.code == 128 + signal.SIGTERM and "goes on after step 23 of 30" in again.out
    assert (beside / "prefix.safetensors").stat().st_mtime_ns == made
    assert Forked(run, job(parts, output)).wait().code == 0
    assert content(output) == undisturbed[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "another settings.seed; this one begins anew"),
        ({"loss": LossSettings(0.6, 2.0)}, "another settings.loss.kd_alpha; this one begins anew"),
        ({"windows": random_windows(7, 16)}, "another windows.ids_sha256, windows.shape; this one begins anew"),
    ],
)
def test_a_state_of_another_training_is_not_gone_on_with(parts, tmp_path, changes, told):
    output = tmp_path / "adapter"
    assert Forked(interrupted, job(parts, output), 9).wait().code != 0
    ended = Forked(run, job(parts, output, **changes)).wait()
    assert ended.code == 0 and told in ended.err
    assert Forked(run, job(parts, tmp_path / "fresh", **changes)).wait().code == 0
    assert content(output) == content(tmp_path / "fresh")


@pytest.mark.parametrize("spoil", ["a byte", "cut short", "no safetensors"])
def test_a_state_that_is_not_what_was_saved_counts_as_none(parts, undisturbed, tmp_path, spoil):
    output, state = tmp_path / "adapter", tmp_path / "adapter.unfinished" / "state.safetensors"
    assert Forked(interrupted, job(parts, output), 9).wait().code != 0
    raw = bytearray(state.read_bytes())
    if spoil == "a byte":
        raw[-9] ^= 1
    state.write_bytes({"a byte": raw, "cut short": raw[:-20], "no safetensors": b"state"}[spoil])
    ended = Forked(run, job(parts, output)).wait()
    assert ended.code == 0 and "cannot be believed" in ended.err
    assert content(output) == undisturbed[0]


def test_two_processes_do_not_train_one_adapter(parts, tmp_path):
    import fcntl

    beside = tmp_path / "adapter.unfinished"
    beside.mkdir()
    with open(beside / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match="another process trains this adapter right now"):
            train_job("B", **job(parts, tmp_path / "adapter"))


def test_a_folder_of_somebody_s_is_left_alone(parts, tmp_path):
    beside = tmp_path / "adapter.unfinished"
    beside.mkdir()
    (beside / "notes.txt").write_text("mine")
    with pytest.raises(PipelineError, match=r"holds files that are of no training: notes\.txt"):
        train_job("B", **job(parts, tmp_path / "adapter"))
    assert (beside / "notes.txt").read_text() == "mine"


def test_a_full_disk_keeps_the_former_state_and_ends_no_training(parts, undisturbed, tmp_path, monkeypatch, capsys):
    from mistral_prune_lora.distillation import unfinished

    saved, save = [], unfinished.save_file

    def full(tensors, path, metadata):
        saved.append(json.loads(metadata["state"])["step"])
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(unfinished, "save_file", full)
    torch.set_num_threads(1)
    with pytest.raises(KeyboardInterrupt):
        train_job("B", **job(parts, tmp_path / "adapter"))
    assert saved == [7, 14, 21]
    assert "the state after step 14 is not saved" in capsys.readouterr().err
    train_job("B", **job(parts, tmp_path / "adapter"))
    assert "goes on after step 7 of 30" in capsys.readouterr().out
    assert content(tmp_path / "adapter") == undisturbed[0]


@pytest.mark.parametrize(("at", "rows"), [("run", None), ("_tell", 1)])
def test_what_fails_before_a_state_leaves_a_curve_with_rows_or_nothing(parts, tmp_path, monkeypatch, at, rows):
    from mistral_prune_lora.distillation import loop

    def failing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.Loop, at, failing)
    beside, one_pass = tmp_path / "adapter.unfinished", OptimiserSettings(3, 1, 2)
    with pytest.raises(PipelineError, match="No space left"):
        train_job("B", **job(parts, tmp_path / "adapter", optimiser=one_pass, held_out_windows=None))
    if rows is None:
        assert not beside.exists()
    else:
        assert len((beside / "training.csv").read_text().splitlines()) == 1 + rows


def test_no_byte_depends_on_the_process(parts, undisturbed, tmp_path):
    """Sets of names have another order in another process; those that are forked here share one."""
    torch.set_num_threads(1)
    train_job("B", **job(parts, tmp_path / "adapter"))
    assert content(tmp_path / "adapter") == undisturbed[0]


def test_other_threads_go_on_and_the_record_says_what_ran_last(parts, tmp_path):
    output = tmp_path / "adapter"
    assert Forked(interrupted, job(parts, output), 9).wait().code != 0
    torch.set_num_threads(2)
    train_job("B", **job(parts, output))
    assert json.loads((output / "training.json").read_text())["machine"] == {"device": "cpu", "threads": 2}


def test_frozen_layers_run_once_and_are_read_in_every_pass(parts, tmp_path, monkeypatch):
    from collections import Counter

    from mistral_prune_lora.distillation import prefix
    from mistral_prune_lora.storage.activations import ActivationReader

    runs, reads, read, run_layers = [], Counter(), ActivationReader.read, prefix.run_to_file

    def counted(self, first, last):
        reads[self.path.name] += last - first
        return read(self, first, last)

    monkeypatch.setattr(ActivationReader, "read", counted)
    monkeypatch.setattr(prefix, "run_to_file", lambda *given: runs.append(given[2]) or run_layers(*given))
    two_passes = OptimiserSettings(6, 1, 2, 1e-2, 1)  # 12 windows of 6
    train_job("B", **job(parts, tmp_path / "adapter", optimiser=two_passes, held_out_windows=None))
    assert [[source.index for source in run] for run in runs] == [[0, 1, 2]]
    assert reads["prefix.safetensors"] == 12
    # In one pass there is nothing to be gained: those layers run as a part of each step.
    train_job("B", **job(parts, tmp_path / "other", optimiser=OptimiserSettings(3, 1, 2), held_out_windows=None))
    assert len(runs) == 1
