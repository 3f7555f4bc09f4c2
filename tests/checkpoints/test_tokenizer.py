"""The five places a tokenizer is looked for, in order, and that a local path never becomes a repository id."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from tiny import save_tokenizer, tiny_config

from mistral_prune_lora.checkpoints.tokenizer import (
    copy_settings,
    find_tokenizer,
    is_tokenizer_of,
    load_tokenizer,
    own_tokenizer,
    tokenizer_files,
    tokenizer_identity,
)
from mistral_prune_lora.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, saved: Path, monkeypatch):
    """Puts a tokenizer into a folder below the working directory; its `name` token tells the folders apart."""
    monkeypatch.chdir(tmp_path)

    def put(name: str) -> Path:
        folder = Path(name)
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": f"<{name}>"}))
        return folder

    return put


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def found(place: Path, **options) -> str:
    """The folder that both functions agree on, relative to the working directory."""
    path = find_tokenizer(place, **options)
    loaded = load_tokenizer(place, **options)
    assert Path(loaded.name_or_path) == path
    assert path.is_absolute()
    name = str(path.relative_to(Path.cwd()))
    assert loaded.pad_token == f"<{name}>"
    return name


@pytest.fixture
def all_five(place):
    """A base model with a tokenizer in each of the five places."""
    for name in ("chosen", "base", "base/original_config", "adapters_base", "manifests_base"):
        place(name)
    write_json(Path("adapter/adapter_config.json"), {"base_model_name_or_path": "./adapters_base"})
    write_json(Path("base/manifest.json"), {"base_model": "manifests_base", "stages": {"A": {"dropped_layers": []}}})


def drop_tokenizer(folder: str) -> None:
    for file in tokenizer_files(folder):
        file.unlink()


def test_step_1_the_path_the_user_names(all_five):
    assert found("base", tokenizer_path="chosen", adapter_path="adapter") == "chosen"


def test_step_2_the_base_model(all_five):
    assert found("base", adapter_path="adapter") == "base"
    assert found("./base/") == "base"


def test_step_3_its_original_config(all_five):
    drop_tokenizer("base")
    assert found("base", adapter_path="adapter") == "base/original_config"


def test_step_4_the_adapters_base_model(all_five):
    drop_tokenizer("base")
    drop_tokenizer("base/original_config")
    assert found("base", adapter_path="adapter") == "adapters_base"


def test_step_4_in_its_original_config(all_five, place):
    """The adapter was trained on a pruned model that keeps the dense model's tokenizer there."""
    drop_tokenizer("adapters_base")
    place("adapters_base/original_config")
    write_json(Path("bundle/bundle_meta.json"), {"indices": [3, 4]})
    assert found("bundle", adapter_path="adapter") == "adapters_base/original_config"


def test_step_5_the_manifests_base_model(all_five):
    for folder in ("base", "base/original_config", "adapters_base"):
        drop_tokenizer(folder)
    assert found("base", adapter_path="adapter") == "manifests_base"
    assert found("base") == "manifests_base"


def test_nothing_found_lists_what_was_tried(all_five):
    for folder in ("base", "base/original_config", "adapters_base", "manifests_base"):
        drop_tokenizer(folder)
    for function in (find_tokenizer, load_tokenizer):
        with pytest.raises(CheckpointError) as caught:
            function("base", adapter_path="adapter")
        here = Path.cwd()
        for folder in ("base", "base/original_config", "adapters_base", "manifests_base"):
            assert f"{here / folder} has no tokenizer files" in caught.value.what
        assert "--tokenizer_path" in str(caught.value)
        assert "\n" not in str(caught.value)
    write_json(Path("adapter/adapter_config.json"), {"peft_type": "LORA"})
    Path("base/manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json names no base_model_name_or_path; .* there is no "
    ):
        find_tokenizer("base", adapter_path="adapter")


def test_the_users_choice_is_not_second_guessed(all_five):
    drop_tokenizer("chosen")
    with pytest.raises(CheckpointError, match="chosen has no tokenizer files"):
        load_tokenizer("base", tokenizer_path="chosen")
    with pytest.raises(CheckpointError, match=r"\./absent does not exist"):
        load_tokenizer("base", tokenizer_path="./absent")


@pytest.mark.parametrize("spelling", ["./model", "model", "model/", "./nested/../model", "{cwd}/model"])
def test_a_local_path_reaches_transformers_absolute(place, monkeypatch, spelling: str):
    """Handed on as it is, a path like ./merged/A was taken for the id of a repository."""
    place("model")
    Path("nested").mkdir()
    asked = []

    def from_pretrained(name, *args, **options):
        asked.append(name)
        return str  # can be called, as a tokenizer is

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    for path in (spelling.format(cwd=Path.cwd()), Path(spelling.format(cwd=Path.cwd()))):
        assert load_tokenizer(path) is str
    assert asked == [str(Path.cwd() / "model")] * 2


@pytest.mark.parametrize("path", ["./absent", "../absent", "/absent/model", "./a/b", "a/b/c", Path("owner/model")])
def test_an_absent_local_path_is_never_asked_of_the_hub(place, monkeypatch, path):
    def from_pretrained(name, *args, **options):
        pytest.fail(f"{name} was asked of the Hub")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match=f"the base model: {path} does not exist"):
        load_tokenizer(path)


def test_hub_ids_are_tried_in_turn(place, monkeypatch):
    """An unreachable repository does not hide a tokenizer that lies at hand further down the chain."""
    place("manifests_base")
    write_json(Path("adapter/adapter_config.json"), {"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"})
    write_json(Path("base/manifest.json"), {"base_model": "manifests_base", "stages": {"A": {"dropped_layers": []}}})
    assert find_tokenizer("base", adapter_path="adapter") == "mistralai/Mistral-7B-v0.1"
    real = transformers.AutoTokenizer.from_pretrained

    def from_pretrained(name, *args, **options):
        if name == "mistralai/Mistral-7B-v0.1":
            raise OSError("We couldn't connect\nto the Hub")
        return real(name, *args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    assert load_tokenizer("base", adapter_path="adapter").pad_token == "<manifests_base>"
    drop_tokenizer("manifests_base")
    with pytest.raises(CheckpointError, match=r"Mistral-7B-v0\.1 on the Hub: We couldn'.*; the manifest"):
        load_tokenizer("base", adapter_path="adapter")


def test_a_model_directory_with_its_config(place):
    folder = place("model")
    tiny_config().save_pretrained(folder)
    tokenizer = load_tokenizer("./model")
    assert tokenizer.decode(tokenizer("café")["input_ids"]) == "café"


def test_malformed_files_are_an_error_where_they_are(all_five):
    Path("base/tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*\(in .*base\)"):
        load_tokenizer("base", adapter_path="adapter")


@pytest.mark.parametrize(
    ("names", "complete"),
    [
        (["tokenizer.model", "tokenizer_config.json"], True),
        (["tokenizer.model"], False),
        (["tokenizer.json", "special_tokens_map.json", "chat_template.jinja"], True),
        (["vocab.json", "merges.txt", "added_tokens.json"], True),
        (["additional_chat_templates/rag.jinja", "tekken.json", "tokenizer.json", "tokenizer.model.v3"], True),
        (["additional_chat_templates/rag.jinja", "tekken.json"], False),
        (["vocab.json"], False),
        (["tokenizer_config.json", "special_tokens_map.json"], False),
        ([], False),
    ],
)
def test_which_files_make_a_tokenizer(tmp_path: Path, names: list[str], complete: bool):
    for name in (*names, "config.json", "model.safetensors", "additional_chat_templates/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = tokenizer_files(tmp_path)
    assert files == [tmp_path / name for name in (sorted(names) if complete else [])]
    (tmp_path / "copy").mkdir()
    copy_settings(files, tmp_path / "copy")
    copies = {file.relative_to(tmp_path / "copy").as_posix() for file in (tmp_path / "copy").rglob("*.*")}
    assert copies == (set(names) if complete else set())
    assert all((tmp_path / "copy" / name).read_text() == name for name in copies)


def test_a_bare_sentencepiece_model_is_told_what_it_lacks(tmp_path: Path):
    """transformers would read it, without the beginning-of-text token and without the leading space."""
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has a tokenizer\.model without its tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_identity_is_of_names_and_bytes(place):
    one, other = place("one"), place("other")
    shutil.copytree(one, "copy")
    Path("copy/config.json").write_text("{}")
    assert tokenizer_identity("copy") == tokenizer_identity("./one") == tokenizer_identity(one)
    assert tokenizer_identity(other) != tokenizer_identity(one)
    (one / "added_tokens.json").write_text("{}")
    assert tokenizer_identity("copy") != tokenizer_identity(one)
    for nowhere in ("nested", "./absent", "owner/model"):
        with pytest.raises(CheckpointError):
            tokenizer_identity(nowhere)


def test_finding_needs_no_transformers(place):
    place("model")
    code = (
        "import sys\n"
        "from mistral_prune_lora.checkpoints.tokenizer import find_tokenizer, tokenizer_files, tokenizer_identity\n"
        "tokenizer_files(find_tokenizer('model')); tokenizer_identity('model')\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


EVIL = """
open("ran.txt", "w").close()
from transformers import PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
class EvilConfig:
    pass
"""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_that_a_tokenizer_brings_is_never_run_whatever_standard_input_says(place, file):
    folder = place("evil")
    (folder / "evil.py").write_text(EVIL)
    known = json.loads((folder / file).read_text()) if (folder / file).is_file() else {"model_type": "evil"}
    maps = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"], "AutoConfig": "evil.EvilConfig"}
    # As somebody would write it who wants it run: no class of transformers' own is named beside it.
    left = {key: value for key, value in known.items() if key != "tokenizer_class"}
    write_json(folder / file, {**left, "auto_map": maps})
    code = (
        "from mistral_prune_lora.errors import CheckpointError\n"
        "from mistral_prune_lora.checkpoints.tokenizer import find_tokenizer, load_tokenizer\n"
        "for function in (load_tokenizer, find_tokenizer):\n"
        "    try: function('base', tokenizer_path='evil')\n"
        "    except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input="y\ny\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path("ran.txt").exists()
    line = "there is an auto_map: this tokenizer or model brings code of its own, and such ones are not taken (in "
    assert done.stdout.count(line) == done.stdout.count("\n") == 2 and f"evil/{file}" in done.stdout


def test_a_repository_that_brings_code_is_not_taken_either(place, monkeypatch):
    """Of one on the Hub nothing is known before it is loaded; what transformers made without the code is refused."""
    folder, real = place("fetched"), transformers.AutoTokenizer.from_pretrained

    def from_pretrained(name, *, trust_remote_code):
        assert trust_remote_code is False
        tokenizer = real(folder)
        tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match=r"brings code of its own, .* \(in owner/model\)"):
        load_tokenizer("owner/model")


def test_a_tokenizer_that_was_saved_again_is_the_same(place):
    """Another version of a library writes the same tokenizer in other bytes."""
    one, other = place("one"), place("other")
    content = json.loads((one / "tokenizer.json").read_text())
    Path("again").mkdir()
    write_json(Path("again/tokenizer.json"), {**content, "truncation": None})
    shutil.copy(one / "tokenizer_config.json", "again")
    assert tokenizer_identity("again") != tokenizer_identity(one)
    here = Path.cwd()
    assert is_tokenizer_of(one, str(here / "again"), tokenizer_identity("again"))
    assert is_tokenizer_of(one, str(here / "gone"), tokenizer_identity(one)), "equal files need not be there any more"
    assert not is_tokenizer_of(one, str(here / "gone"), "0" * 64)
    assert not is_tokenizer_of(one, "owner/model", "0" * 64)
    assert not is_tokenizer_of(one, str(here / "again"), "0" * 64), "it has been changed since"
    assert not is_tokenizer_of(one, str(here / "other"), tokenizer_identity(other)), "another padding token"
    content["model"]["vocab"]["a"], content["model"]["vocab"]["b"] = (
        content["model"]["vocab"][token] for token in "ba"
    )
    write_json(Path("again/tokenizer.json"), content)
    assert not is_tokenizer_of(one, str(here / "again"), tokenizer_identity("again"))


def test_a_models_own_tokenizer_is_beside_it_or_in_its_original_config(all_five):
    assert own_tokenizer("base") == Path("base")
    drop_tokenizer("base")
    assert own_tokenizer("base") == Path("base/original_config")
    drop_tokenizer("base/original_config")
    assert own_tokenizer("base") is None, "what the manifest names is another model's"
