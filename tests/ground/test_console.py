import io

import pytest

from mistral_prune_lora import console
from mistral_prune_lora.errors import PipelineError


def test_a_job_prints_to_the_terminal_and_keeps_a_log(tmp_path, capsys):
    with console.job(tmp_path / "job.log"):
        print("merged 24 layers")
    assert capsys.readouterr().out == "merged 24 layers\n"
    assert (tmp_path / "job.log").read_text() == "merged 24 layers\n"


def test_a_mistake_of_the_user_ends_the_job_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, console.job(tmp_path / "job.log"):
        raise PipelineError("there is no adapter", where="adapters/C", mend="train it")
    assert stop.value.code == 1
    line = "error: there is no adapter (in adapters/C). Train it.\n"
    assert capsys.readouterr().err == line
    assert (tmp_path / "job.log").read_text() == line


def test_a_bug_keeps_its_traceback_in_the_log(tmp_path):
    with pytest.raises(ZeroDivisionError), console.job(tmp_path / "job.log"):
        _ = 1 / 0
    log = (tmp_path / "job.log").read_text()
    assert "Traceback" in log and "ZeroDivisionError" in log


def test_a_moving_bar_leaves_few_lines_in_the_log_and_its_last_state(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    terminal, log = io.StringIO(), io.StringIO()
    tee = console._Tee(terminal, log)
    for state in range(100):
        tee.write(f"\rmerge: {state}%")
    tee.write("\n")
    assert terminal.getvalue().count("\r") == 100
    kept = log.getvalue().splitlines()
    assert kept[-1] == "merge: 99%"
    assert 2 <= len(kept) <= 10 and all(line.startswith("merge: ") for line in kept)
