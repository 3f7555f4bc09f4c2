"""A killed evaluation goes on where it stopped: same bits, nothing computed twice."""

import json
import math
import os
import signal
import time
import zlib

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from evaluation_project import LAYOUT
from forked import Forked
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.evaluation import command as evaluation_command
from mistral_prune_lora.evaluation.command import forget_old_work
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.mistral_eval_ppl_mergedmodel import main
from mistral_prune_lora.models.pass_layer import PassLayer
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import Compute

BATCHES = 8
PASSES_IN_ALL = 5 * BATCHES  # three tails; layers 0-2 and 3-4 once


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_dense(tmp_path / "dense", vocab_size=259)
    save_tokenizer(tmp_path / "dense")
    cut(tmp_path / "dense", LAYOUT, tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} is about {i * i}." for i in range(60)))
    return tmp_path


def slow_command(folder, seconds: float, words: list[str]) -> int:
    """Run the command, note layers and windows of every forward pass in a file, and take its time over each."""
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    forward = Backbone.__call__

    def noted(self, hidden, *others):
        result = forward(self, hidden, *others)
        resident = [i for i, layer in enumerate(self._model.layers) if not isinstance(layer, PassLayer)]
        with open("passes.txt", "a") as file:
            file.write(f"{resident} {hidden.sum().item()!r}\n")
        time.sleep(seconds)
        return result

    Backbone.__call__ = noted
    return main(words)


def start(folder, seconds: float, name: str) -> Forked:
    words = ["--model_path", "A", "--bundles_dir", "bundles", "--text_file", "text.txt", "--seqlen", "32"]
    words += ["--batch_size", "3", "--max_batches", str(BATCHES), "--device", "cpu", "--dtype", "fp32"]
    return Forked(slow_command, folder, seconds, [*words, "--json", f"{name}.json"])


def passes(folder) -> list[str]:
    file = folder / "passes.txt"
    return file.read_text().splitlines() if file.is_file() else []


def finish(folder, name: str) -> dict:
    ended = start(folder, 0, name).wait()
    assert ended.code == 0, ended.err
    return json.loads((folder / f"{name}.json").read_text())


def kill_after(folder, count: int, journalled: str) -> None:
    """Kill a run -9 once it has made `count` passes in all and left an entry in a journal of that name."""
    command = start(folder, 0.1, "killed")
    deadline = time.monotonic() + 120
    while len(passes(folder)) < count or not entries(folder, journalled):
        assert command.process.is_alive() and time.monotonic() < deadline, command.wait().err
        time.sleep(0.005)
    command.process.kill()
    assert command.wait().code == -signal.SIGKILL
    assert not (folder / "killed.json").exists()


def entries(folder, pattern: str) -> int:
    """Batches that journals name."""
    return sum(max(0, file.read_text().count("\n") - 1) for file in (folder / "cache").rglob(pattern))


def test_a_killed_command_goes_on_with_the_same_bits(folder):
    undisturbed = finish(folder, "undisturbed")
    whole = passes(folder)
    assert len(whole) == len(set(whole)) == PASSES_IN_ALL
    (folder / "passes.txt").unlink()
    # Once among the boundary activations of layers 0-2, then in the scores of A, then in layers 3-4.
    kill_after(folder, 3, ".*.journal")
    kill_after(folder, BATCHES + 4, "*.scores")
    kill_after(folder, 2 * BATCHES + 3, ".*.journal")
    continued = finish(folder, "continued")
    assert continued == undisturbed
    made = passes(folder)
    # A kill between a pass and its journal entry costs that one pass, three kills at most three.
    assert set(made) == set(whole)
    assert PASSES_IN_ALL <= len(made) <= PASSES_IN_ALL + 3
    assert not list((folder / "cache").rglob("*.safetensors")), "what was kept for a kill must be gone"


@pytest.fixture
def counted(folder, monkeypatch):
    """Evaluates into one work folder; returns all scores and how many passes it took, or breaks down on the way."""
    subject = Subject.open(folder / "A", {part: folder / "bundles" / part for part in "BC"})
    windows, calls = random_windows(7, 16), []
    forward = Backbone.__call__

    def run(work_dir, broken_after: int | None = None):
        calls.clear()

        def call(self, *given):
            if len(calls) == broken_after:
                raise KeyboardInterrupt
            calls.append(1)
            return forward(self, *given)

        monkeypatch.setattr(Backbone, "__call__", call)
        compute = Compute(torch.device("cpu"), torch.bfloat16, 2)
        found = [
            result.scores.nll.tolist()
            for result in evaluate_stages(subject, STAGES, windows, compute, work_dir=work_dir)
        ]
        return found, len(calls)

    return run


def test_a_finished_work_dir_is_only_read(folder, counted):
    first, passes = counted(folder / "work")
    assert passes == 5 * 4
    assert counted(folder / "work") == (first, 0)


@pytest.mark.parametrize("broken_after", range(0, 20, 3))
def test_an_interrupted_run_repeats_no_pass(folder, counted, broken_after):
    expected, passes = counted(folder / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        counted(folder / "work", broken_after)
    assert counted(folder / "work") == (expected, passes - broken_after)


def test_a_torn_line_of_a_journal_costs_its_batch_only(folder, counted):
    expected, _ = counted(folder / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        counted(folder / "work", 3)
    (journal,) = (folder / "work").glob(".*.journal")
    journal.write_bytes(journal.read_bytes()[:-9] + b"\xff\x00")
    assert counted(folder / "work") == (expected, 18)


def test_a_torn_line_of_scores_costs_its_batch_only(folder, counted):
    expected, _ = counted(folder / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        counted(folder / "work", 7)
    (scores,) = (folder / "work").glob("*.scores")
    scores.write_bytes(scores.read_bytes()[:-20])
    assert counted(folder / "work") == (expected, 14)


@pytest.mark.parametrize("damage", ["changed", "cut short", "gone"])
def test_a_corrupted_batch_is_computed_again(folder, counted, damage):
    expected, _ = counted(folder / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        counted(folder / "work", 3)
    (partial,) = (folder / "work").glob(".*.partial")
    content = bytearray(partial.read_bytes())
    if damage == "changed":
        content[-5000] ^= 1  # in the last of three finished batches
        partial.write_bytes(content)
    elif damage == "cut short":
        partial.write_bytes(content[:-3])
    else:
        partial.unlink()
    repeated = 3 if damage == "gone" else 1
    assert counted(folder / "work") == (expected, 17 + repeated)


def activation_files(work):
    """By the number of layers that led there: [0-2, 3-4]."""
    return sorted(work.glob("*.safetensors"), key=lambda file: len(ActivationReader(file).run["layers"]))


def test_changed_activations_never_give_another_number(folder, counted):
    expected, _ = counted(folder / "work")
    first, second = activation_files(folder / "work")
    for scores in (folder / "work").glob("*.scores"):
        scores.unlink()
    content = bytearray(second.read_bytes())
    content[-1000] ^= 4
    second.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"window \d is not the one that was written \(in {second}\)\. Delete it and run"
    ):
        counted(folder / "work")
    second.unlink()
    assert counted(folder / "work")[0] == expected
    assert first.is_file()


def test_activations_of_former_versions_are_made_anew(folder, counted, capsys):
    expected, passes = counted(folder / "work")
    files = activation_files(folder / "work")
    for file in files:
        hidden = load_file(file)["hidden_states"]
        save_file({"hidden_states": hidden}, file, metadata={"run": json.dumps(ActivationReader(file).run)})
    for scores in (folder / "work").glob("*.scores"):
        scores.unlink()
    assert counted(folder / "work") == (expected, passes)
    said = capsys.readouterr().err
    for file in files:
        assert said.count(f"warning: {file} has no checksums of its windows; it is made anew") == 1
    assert counted(folder / "work") == (expected, 0)


def test_activations_under_another_name_are_not_used(folder, counted):
    """Their names tell what they are of; what the file itself says is asked all the same."""
    expected, passes = counted(folder / "work")
    first, second = activation_files(folder / "work")
    second.write_bytes(first.read_bytes())
    for scores in (folder / "work").glob("*.scores"):
        scores.unlink()
    assert counted(folder / "work") == (expected, passes - 4), "only layers 0-2 were there"


def edited(line: str, **changes) -> str:
    """A line of a journal with another content and the checksum that fits it."""
    text = json.dumps({**json.loads(line.split(" ", 1)[1]), **changes})
    return f"{zlib.crc32(text.encode()):08x} {text}"


ONE = [1.0]


@pytest.mark.parametrize(
    ("spoil", "again"),
    [
        (lambda lines: [line.replace(".", "0.", 1) if i == 2 else line for i, line in enumerate(lines)], 1),
        (lambda lines: [*lines, edited(lines[1], batch=4)], 0),
        (lambda lines: [*lines, edited(lines[1], batch=-1)], 0),
        (lambda lines: [*lines, edited(lines[2], nll=[9.0, 9.0])], 0),
        (lambda lines: [*lines, edited(lines[2], batch=None)], 0),
        (lambda lines: [*lines[:4], edited(lines[4], nll=ONE * 2)], 1),
        (lambda lines: [*lines[:4], edited(lines[4], nll=[])], 1),
        (lambda lines: [*lines[:4], edited(lines[4], nll=[math.nan])], 1),
        (lambda lines: [*lines[:4], edited(lines[4], nll=["1.0"])], 1),
        (lambda lines: [*lines[:4], edited(lines[4], nll=[10**400])], 1),
        (lambda lines: [*lines[:4], edited(lines[4], nll=1.0)], 1),
        (lambda lines: [*lines[:4], edited(lines[4], correct=None)], 1),
        (lambda lines: [*lines[:4], edited(lines[4], batch="3")], 1),
        (lambda lines: [*lines[:4], edited(lines[4], batch=True)], 1),
    ],
    ids=["digit", "beyond", "negative", "twice", "no batch", "longer", "shorter", "nan", "text", "huge", "bare", "none",
         "text batch", "true"],
)  # fmt: skip
def test_scores_that_cannot_be_are_computed_again_and_said(folder, counted, capsys, spoil, again):
    expected, _ = counted(folder / "work")
    scores = min((folder / "work").glob("*.scores"))
    lines = scores.read_text().splitlines()
    assert len(lines) == 1 + 4, "7 windows, two a batch: the last one holds one"
    scores.write_text("\n".join(spoil(lines)) + "\n")
    assert counted(folder / "work") == (expected, again)
    assert f"warning: {scores}: an entry is not what was written" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(folder, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_command, "evaluate_stages", interrupted)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main(["--model_path", "A", "--text_file", "text.txt", "--seqlen", "32", "--device", "cpu"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[1:] == ["interrupted: the same command goes on where this one stopped"]


def test_what_a_killed_command_left_is_forgotten_after_a_week(tmp_path):
    for name, days in (("old", 8), ("recent", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".x.partial").touch()
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / name / ".x.partial", (then, then))
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/link").symlink_to("nowhere")
    forget_old_work(tmp_path)
    forget_old_work(tmp_path / "not there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "recent"]


def test_a_work_dir_of_other_weights_is_not_used(folder, counted):
    expected, _ = counted(folder / "work")
    save_dense(folder / "other", seed=3, vocab_size=259)
    _, bundles = cut(folder / "other", LAYOUT, folder / "cut")
    for file in bundles["C"].iterdir():
        (folder / "bundles/C" / file.name).write_bytes(file.read_bytes())
    changed, again = counted(folder / "work")
    assert changed[:2] == expected[:2] and changed[2] != expected[2]
    assert again == 4, "only the tail with C"
