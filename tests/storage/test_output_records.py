"""What is there already is replaced if the same command wrote it, by what its record says; else only by word."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from merge_oracle import edit_json
from output_project import COMMANDS, error_line, record, snapshot

WRITERS = {
    "merge A": ("output_dir", "merge.json", ""),
    "merge B": ("output_dir", "merge.json", ""),
    "train": ("output_dir", "training.json", ""),
    "prune": ("save_dir", "prune.json", ""),
    "prune B": ("save_removed_dir", "prune.json", "B"),
    "prune C": ("save_removed_dir", "prune.json", "C"),
}


AUTHORS = {"merge": "a merge", "train": "training", "prune": "pruning"}


def write(name: str, place: Path, *more: str) -> tuple[int, Path]:
    """Run a command with one of its output directories at a place; returns exit code and that directory."""
    flag, _, below = WRITERS[name]
    command = name if name in COMMANDS else "prune"
    others = {other: place.with_name(f"{other} of {place.name}") for other in ("save_dir", "save_removed_dir")}
    outputs = others | {flag: place} if command == "prune" else {flag: place}
    return COMMANDS[command].run(*more, **outputs), place / below


@pytest.mark.parametrize("name", WRITERS)
def test_somebodys_directory_is_replaced_only_by_word(name, user_folder, tmp_path, capsys):
    """Names of our files make nothing ours."""
    thesis = tmp_path / "out" / WRITERS[name][2] / "tokenizer_my_thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    for other in ("config.json", "adapter_config.json", "bundle_meta.json", "layer_003.safetensors"):
        (thesis.parent / other).write_text("{}")
    before = snapshot(tmp_path)
    for content in (None, "{}", '{"command": "another"}', "[1]", "{" * 100_000, "no JSON"):
        if content is not None:
            (thesis.parent / WRITERS[name][1]).write_text(content)
        before = snapshot(tmp_path)
        assert write(name, tmp_path / "out")[0] == 1
        assert (
            f"holds no record of {'a merge' if 'merge' in name else 'training' if name == 'train' else 'pruning'}"
            in (line := error_line(capsys))
        )
        assert "give --overwrite" in line
        assert snapshot(tmp_path) == before
    code, folder = write(name, tmp_path / "out", "--overwrite")
    assert code == 0
    assert not thesis.exists() and (folder / WRITERS[name][1]).is_file()


@pytest.mark.parametrize("name", WRITERS)
def test_a_command_replaces_what_it_has_written_and_nothing_that_was_added(name, user_folder, tmp_path, capsys):
    assert write(name, tmp_path / "out")[0] == 0
    code, folder = write(name, tmp_path / "out")
    assert code == 0
    (folder / "notes").mkdir()
    (folder / "notes/tokenizer_my_thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert write(name, tmp_path / "out")[0] == 1
    assert f"holds files that its {WRITERS[name][1]} does not name: notes/tokenizer_my_thesis.txt" in error_line(capsys)
    (folder / "notes/tokenizer_my_thesis.txt").unlink()
    assert write(name, tmp_path / "out")[0] == 0
    for other in WRITERS:
        if other.split()[0] != name.split()[0] or ("prune" in name and other != name):
            shutil.rmtree(tmp_path / "other", ignore_errors=True)
            target = tmp_path / "other" / WRITERS[other][2]
            shutil.copytree(folder, target)
            capsys.readouterr()
            assert write(other, tmp_path / "other")[0] == 1
            assert "holds no record of" in error_line(capsys)


def test_an_empty_directory_is_nobodys(user_folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert write("merge B", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(("name", "dropped"), [("merge A", ["command"]), ("train", ["command", "files"])])
def test_records_that_do_not_name_their_command_yet_are_known(name, dropped, user_folder, tmp_path, capsys):
    _, folder = write(name, tmp_path / "out")
    told = record(folder / WRITERS[name][1])
    (folder / WRITERS[name][1]).write_text(json.dumps({k: v for k, v in told.items() if k not in dropped}))
    assert write(name, tmp_path / "out")[0] == 0
    told.pop("versions")
    (folder / WRITERS[name][1]).write_text(json.dumps({k: v for k, v in told.items() if k not in dropped}))
    capsys.readouterr()
    assert write(name, tmp_path / "out")[0] == 1
    assert "holds no record of" in error_line(capsys)


def test_a_record_that_is_no_regular_file_is_none(user_folder, tmp_path, capsys):
    """A pipe would be waited for; a link's content is not this directory's."""
    write("merge B", tmp_path / "other")
    for kind in ("fifo", "link"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "other", tmp_path / "out")
        (tmp_path / "out/merge.json").unlink()
        if kind == "fifo":
            os.mkfifo(tmp_path / "out/merge.json")
        else:
            (tmp_path / "out/merge.json").symlink_to(tmp_path / "other/merge.json")
        capsys.readouterr()
        assert write("merge B", tmp_path / "out")[0] == 1
        assert "holds no record of a merge" in error_line(capsys)
    edit_json(tmp_path / "other/merge.json", outputs=["layer_003.safetensors"])
    assert write("merge B", tmp_path / "other")[0] == 1


def test_results_replace_results_and_other_files_only_by_word(user_folder, tmp_path, capsys):
    command, files = COMMANDS["evaluate a mirror"], {"json": tmp_path / "r.json", "csv": tmp_path / "r.csv"}
    for _ in range(2):
        assert command.run(**files) == 0
    with open(files["csv"], newline="") as file:
        rows = [[*row, note] for row, note in zip(csv.reader(file), ["my notes", "years of work"], strict=True)]
    results = record(files["json"])
    spoilt = {
        "json": ['{"results": []}', json.dumps({**results, "notes": "years of work"}), "not JSON", "[]", ""],
        "csv": ["\n".join(map(",".join, rows)), "label,mine\n", "", "\0"],
    }
    for flag, contents in spoilt.items():
        for content in contents:
            files[flag].write_text(content)
            capsys.readouterr()
            assert command.run(**files) == 1
            assert f"was not written by an evaluation (in --{flag} " in error_line(capsys)
            assert files[flag].read_text() == content
        assert command.run("--overwrite", **files) == 0
        assert command.run(**files) == 0


def test_a_log_of_pruning_replaces_another(user_folder, tmp_path, capsys):
    command, log = COMMANDS["prune"], tmp_path / "log.json"
    places = {"save_dir": tmp_path / "A", "save_removed_dir": tmp_path / "bundles"}
    for _ in range(2):
        assert command.run(**places, prune_log=log) == 0
        assert log.read_bytes() == (tmp_path / "A/prune_log.json").read_bytes()
    assert command.run(**places, prune_log=tmp_path / "A/prune_log.json") == 0, "it is there anyway"
    log.write_text("years of work")
    capsys.readouterr()
    assert command.run(**places, prune_log=log) == 1
    assert "was not written by pruning (in --prune_log " in error_line(capsys)
    assert command.run(**places, prune_log=tmp_path / "A/other.json") == 0, "a second name inside A"
    assert (tmp_path / "A/other.json").read_bytes() == (tmp_path / "A/prune_log.json").read_bytes()


@pytest.mark.parametrize("made", ["fifo", "device", "directory"])
def test_only_files_are_replaced_by_files(made, user_folder, tmp_path, capsys):
    place = tmp_path / "results"
    if made == "directory":
        place.mkdir()
    elif made == "fifo":
        os.mkfifo(place)
    else:
        place = Path("/dev/null")
    mode = place.stat().st_mode
    for flag in ("json", "csv"):
        assert COMMANDS["evaluate a mirror"].run("--overwrite", **{flag: place}) == 1
        assert "is a directory, not a file" in (line := error_line(capsys)) or "is a device or a pipe" in line
    assert place.stat().st_mode == mode
