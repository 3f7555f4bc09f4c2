"""That an output can be put in place is known before anything long; if it then cannot be, nothing is lost."""

from __future__ import annotations

import os

import pytest
from output_project import COMMANDS, INPUTS, error_line, record
from peft import PeftConfig

from mistral_prune_lora.distillation import train as distillation

# The first step of each command that takes long.
FIRST_STEPS = {
    "merge A": "mistral_prune_lora.merging.merge.stream_file",
    "merge B": "mistral_prune_lora.merging.merge.stream_file",
    "train": "mistral_prune_lora.text.sources.load_text",
    "prune": "mistral_prune_lora.pruning.cut._copy_tensors",
    "evaluate": "mistral_prune_lora.evaluation.command.load_text",
}


@pytest.mark.parametrize("command", FIRST_STEPS)
@pytest.mark.parametrize("place", ["file/out", "x" * 256, "mounted"])
def test_what_cannot_be_put_in_place_is_known_before_anything_long(
    command, place, user_folder, tmp_path, capsys, monkeypatch, mount
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(FIRST_STEPS[command], lambda *args, **options: pytest.fail("began"))
    outputs = COMMANDS[command].outputs
    if place == "mounted":
        outputs = {flag: kind for flag, kind in outputs.items() if kind in ("directory", "parts")}
        if not outputs:
            return
        mount(tmp_path / "mounted", "-t", "tmpfs", "none")
        mount(tmp_path / "mounted/B", "-t", "tmpfs", "none")
    whole = {flag: tmp_path / f"other {flag}" for flag, kind in outputs.items() if kind in ("directory", "parts")}
    for flag in outputs:
        assert COMMANDS[command].run("--overwrite", **{**whole, flag: tmp_path / place}) == 1
        line = error_line(capsys)
        assert any(
            told in line
            for told in ("no directory to write to", "a file, not a directory", "name too long", "mount point")
        ), line
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "mounted"}


def test_a_search_is_not_begun_for_a_place_that_cannot_be_written(user_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mistral_prune_lora.pruning.data.get_loaders", lambda *a, **o: pytest.fail("began"))
    (tmp_path / "file").touch()
    words = ["--model", INPUTS["dense"], "--text_file", INPUTS["text"], "--device", "cpu"]
    for flag in ("save_dir", "save_removed_dir", "prune_log"):
        outputs = {"save_dir": tmp_path / "A", "save_removed_dir": tmp_path / "b", flag: tmp_path / "file/x"}
        given = [word for name, path in outputs.items() for word in (f"--{name}", str(path))]
        assert COMMANDS["prune"].main([*words, *given]) == 1
        assert "is a file, not a directory" in error_line(capsys)


def test_training_is_not_begun_without_room_for_the_adapter(user_folder, tmp_path, capsys, monkeypatch, mount):
    monkeypatch.setattr(distillation.Loop, "run", lambda *args: pytest.fail("began"))
    small = mount(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "none")
    assert COMMANDS["train"].run(output_dir=small / "out") == 1
    assert "B are needed and are not there: No space left on device" in error_line(capsys)
    assert os.listdir(small) == []


def test_room_is_held_while_training(user_folder, tmp_path, capsys, monkeypatch, mount):
    """Somebody fills the disk meanwhile; the adapter is written all the same."""
    disk, fit = mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "none"), distillation.Loop.run

    def filling(*args):
        with open(disk / "filler", "wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        return fit(*args)

    monkeypatch.setattr(distillation.Loop, "run", filling)
    assert COMMANDS["train"].run(output_dir=disk / "out") == 0
    assert PeftConfig.from_pretrained(disk / "out").r == 2
    assert "reserved" not in os.listdir(disk / "out")


def test_pruning_is_not_begun_without_room_for_all_parts(user_folder, tmp_path, capsys, mount):
    """A alone would fit, and so would each bundle."""
    whole = (user_folder / INPUTS["dense"] / "model.safetensors").stat().st_size
    room = 3 * (64 << 20) + whole // 2
    small = mount(tmp_path / "small", "-t", "tmpfs", "-o", f"size={room}", "none")
    assert COMMANDS["prune"].run(save_dir=small / "A", save_removed_dir=small) == 1
    assert "B are needed and" in error_line(capsys)
    assert os.listdir(small) == []


def test_a_trained_adapter_that_cannot_be_put_in_place_is_kept(user_folder, tmp_path, capsys, monkeypatch):
    out, fit = tmp_path / "out", distillation.Loop.run

    def meanwhile(*args):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        return fit(*args)

    monkeypatch.setattr(distillation.Loop, "run", meanwhile)
    assert COMMANDS["train"].run(output_dir=out) == 1
    line = error_line(capsys)
    assert "the result is finished but cannot be put in place: holds no record of training" in line
    (kept,) = [path for path in tmp_path.iterdir() if path.name.startswith("out.finished-")]
    assert f"{kept} is to become {out}" in line
    assert PeftConfig.from_pretrained(kept).r == 2 and os.listdir(out) == ["thesis.txt"]


def test_results_that_cannot_be_put_in_place_are_kept(user_folder, tmp_path, capsys, monkeypatch):
    place, summary = tmp_path / "r.json", "mistral_prune_lora.evaluation.command.summary"
    monkeypatch.setattr(summary, lambda records: place.write_text("years of work") and "")
    assert COMMANDS["evaluate a mirror"].run(json=place) == 1
    line = error_line(capsys)
    assert "cannot be put in place: was not written by an evaluation" in line
    (kept,) = tmp_path.glob("r.json.finished-*.json")
    assert str(kept) in line and record(kept)["results"] and place.read_text() == "years of work"
