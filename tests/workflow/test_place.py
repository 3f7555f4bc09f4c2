"""What was made, in an experiment's folder, and what is removed on request."""

import json
import os
import shutil

import pytest

from mistral_prune_lora.workflow.place import NOTE, place
from mistral_prune_lora.workflow.tidy import tidy


@pytest.fixture
def made(tmp_path):
    """A made directory with a file below it."""
    folder = tmp_path / "results/shared/merged/A-1"
    (folder / "below").mkdir(parents=True)
    (folder / "model").write_text("one")
    (folder / "below/template").write_text("two")
    return folder


def test_a_directory_is_linked_and_follows_its_source(made, tmp_path):
    target = tmp_path / "results/x/A_merged"
    target.mkdir(parents=True)
    (target / "notes of mine").write_text("mine")
    place(made, target)
    assert (target / "model").samefile(made / "model") and (target / "below/template").read_text() == "two"
    assert json.loads((target / NOTE).read_text()) == {"made": str(made), "files": ["below/template", "model"]}
    other = made.with_name("A-2")
    other.mkdir()
    (other / "model").write_text("three")
    place(other, target)
    assert (target / "model").read_text() == "three" and not (target / "below/template").exists()
    assert (target / "notes of mine").read_text() == "mine" and (made / "below/template").exists()


def test_a_link_gets_a_time_of_its_own(made, tmp_path):
    """Snakemake touches every output after a job, and must not touch the input with it."""
    placed = tmp_path / "results/x/model"
    os.utime(made / "model", (1e9, 1e9))
    place(made / "model", placed)
    os.utime(placed, follow_symlinks=False)
    assert (made / "model").stat().st_mtime == 1e9 < placed.lstat().st_mtime and placed.read_text() == "one"
    shutil.move(tmp_path / "results", tmp_path / "moved")
    assert (tmp_path / "moved/x/model").read_text() == "one"


def test_what_lay_there_is_replaced_and_what_it_was_linked_to_is_not(made, tmp_path):
    placed = tmp_path / "results/x/model"
    place(made / "model", placed)
    place(made / "below/template", placed)
    assert placed.read_text() == "two" and (made / "model").read_text() == "one"
    placed.unlink()
    os.link(made / "model", placed)
    place(made / "model", placed)
    assert placed.is_symlink() and not (made / "model").is_symlink()


def test_a_note_cannot_lead_out_of_the_directory(made, tmp_path):
    target = tmp_path / "results/x/A_merged"
    target.mkdir(parents=True)
    (tmp_path / "precious").write_text("stays")
    names = ["../../../precious", str(tmp_path / "precious")]
    (target / NOTE).write_text(json.dumps({"files": names}))
    place(made, target)
    assert (tmp_path / "precious").exists()


def test_tidy_removes_what_nobody_asks_for_or_links_to(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("A-2", "A-3"):
        made.with_name(name).mkdir()
        (made.with_name(name) / "model").write_text(name)
    place(made, tmp_path / "results/gone/A_merged")
    assert tidy("results/shared", ["results/shared/merged/A-2"]) == 3
    assert {path.name for path in made.parent.iterdir()} == {"A-1", "A-2"}
    assert "A-3: 0.0 MB removed" in capsys.readouterr().out
    assert tidy("nowhere", []) == 0
