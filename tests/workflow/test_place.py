"""What was made, in an experiment's folder, and what is removed on request."""

import json
import os

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


def test_without_hard_links_there_are_symbolic_ones(made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("none here")))
    place(made / "model", tmp_path / "results/x/model")
    assert (tmp_path / "results/x/model").is_symlink() and (tmp_path / "results/x/model").read_text() == "one"


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
