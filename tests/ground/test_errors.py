"""What an error looks like to a user: one line, of a length that a terminal shows, whatever is in the names."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from mistral_prune_lora.console import job
from mistral_prune_lora.errors import PipelineError, as_mistake, printable, reports_errors


def test_a_line_says_what_where_and_how_to_mend_it():
    assert str(PipelineError("there is no adapter", where="adapters/C", mend="train it")) == (
        "there is no adapter (in adapters/C). Train it."
    )
    assert str(PipelineError("there is no adapter")) == "there is no adapter."


def error_of(capsys) -> str:
    """What a command printed on stderr after the line that says which package runs."""
    return capsys.readouterr().err.partition("\n")[2]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb\x1b[31m", r"a\nb\x1b[31m"),
        ("\r\t\x00\x7f\x9b", r"\r\t\x00\x7f\x9b"),
        ("right\u202eleft\u2028", r"right\u202eleft\u2028"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("모델/café", "모델/café"),
        ("a b", "a b"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped(name, shown):
    assert printable(name) == shown and printable(shown) == shown
    for error in (PipelineError(name), PipelineError("x", where=name), PipelineError("x", mend=name)):
        line = str(error)
        assert line.isprintable() and shown[1:] in line
        line.encode("utf-8")


@pytest.mark.parametrize(
    "pieces",
    [("w" * 5000, "p" * 5000, "m" * 5000), ("w", "/p" * 2000, "m"), ("w" * 400, "p" * 100, "m" * 300), ("w\n" * 300,)],
)
def test_a_printed_line_has_at_most_500_characters(pieces, capsys):
    @reports_errors
    def main():
        raise PipelineError(*pieces[:1], **dict(zip(("where", "mend"), pieces[1:], strict=False)))

    assert main() == 1
    line = error_of(capsys)
    assert line.startswith("error: w") and line.count("\n") == 1 and 400 < len(line.rstrip("\n")) <= 500
    if len(pieces) == 3:
        assert "…" in line and line.rstrip("\n").endswith("m." if pieces[2] != "m" else "M.")


def test_a_directory_of_an_odd_name_is_one_line(tmp_path, capsys):
    from mistral_prune_lora.mistral_eval_ppl_mergedmodel import main

    folder = tmp_path / "a\nb\x1b[31m"
    folder.mkdir()
    assert main(["--model_path", str(folder), "--device", "cpu"]) == 1
    line = error_of(capsys)
    assert line.startswith("error: ") and line.count("\n") == 1 and r"a\nb\x1b[31m" in line


def test_a_log_takes_any_name(tmp_path):
    with job(tmp_path / "log"):
        print(f"model {os.fsdecode(bytes([0xFF]))}", file=sys.stderr)
    assert (tmp_path / "log").read_text() == "model \\udcff\n"


def numpy_without_memory():
    import numpy as np

    np.zeros(1 << 60, dtype=np.uint8)


def thread_that_is_refused():
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    "ask",
    [lambda: bytearray(1 << 62), lambda: torch.zeros(1 << 50, dtype=torch.uint8), numpy_without_memory,
     thread_that_is_refused],
    ids=["python", "torch", "numpy", "thread"],
)  # fmt: skip
def test_lack_of_memory_is_one_line(ask, capsys, tmp_path):
    assert reports_errors(ask)() == 1
    line = error_of(capsys)
    assert line.startswith("error: there is not enough memory, or there are too many threads: ")
    assert line.count("\n") == 1
    with pytest.raises(SystemExit) as ended, job(tmp_path / "log"):
        ask()
    assert ended.value.code == 1 and "Traceback" not in (tmp_path / "log").read_text()


def test_a_full_disk_is_one_line_and_names_the_file(capsys):
    @reports_errors
    def main():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/result.json")

    assert main() == 1
    assert error_of(capsys).startswith("error: No space left on device (in out/result.json). ")


def test_a_bug_keeps_its_traceback():
    for bug in (ValueError("x"), OSError(errno.ENOENT, "x"), RuntimeError("shapes do not fit"), KeyError("x")):
        assert as_mistake(bug) is None


# All that is imported first, then as little more memory as one thread's stack needs.
STARVED = """
import resource, sys
from mistral_prune_lora.evaluation import command as evaluation_command
from mistral_prune_lora.mistral_eval_ppl_mergedmodel import main
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + int(sys.argv[1]), -1))
code = main(sys.argv[2:])
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))  # what torch does when Python ends is not the command's
sys.exit(code)
"""


@pytest.mark.parametrize("spare", [100_000, 12_000_000])
def test_an_evaluation_that_is_starved_of_memory_ends_with_one_line(dense_dir, tmp_path, spare):
    from tiny import save_tokenizer

    save_tokenizer(dense_dir)
    (tmp_path / "text.txt").write_text("A few words for ninety-six tokens. " * 50)
    arguments = ["--model_path", str(dense_dir), "--text_file", str(tmp_path / "text.txt"), "--seqlen", "64"]
    done = subprocess.run(
        [sys.executable, "-c", STARVED, str(spare), *arguments, "--device", "cpu", "--work_dir", str(tmp_path / "w")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "not enough memory" in errors[0]


def test_a_full_disk_as_a_library_in_rust_tells_it():
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert str(as_mistake(RuntimeError(told))).startswith("No space left on device. ")
    assert as_mistake(RuntimeError("another")) is None
