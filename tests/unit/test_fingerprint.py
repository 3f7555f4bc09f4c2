import shutil
from pathlib import Path

import pytest

from mistral_prune_lora import fingerprint


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library's sources that a test may edit."""
    root = tmp_path / "mistral_prune_lora"
    shutil.copytree(Path(fingerprint.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "_ROOT", root)
    fingerprint._imports.cache_clear()
    yield root
    fingerprint._imports.cache_clear()


def edit(path):
    path.write_text(path.read_text() + "\n# edited\n")
    fingerprint._imports.cache_clear()


def test_an_edit_changes_the_digest_of_what_imports_it_and_of_nothing_else(library):
    merge, model = fingerprint.code_digest("merge"), fingerprint.code_digest("model")
    edit(library / "model.py")
    assert fingerprint.code_digest("merge") == merge
    assert fingerprint.code_digest("model") != model
    edit(library / "safetensors_file.py")
    assert fingerprint.code_digest("merge") != merge


def test_wording_and_display_and_what_is_refused_do_not_count(library):
    before = fingerprint.code_digest("merge")
    edit(library / "console.py")
    edit(library / "errors.py")
    edit(library / "families.py")
    assert fingerprint.code_digest("merge") == before


def test_a_module_that_is_not_there_is_an_error(library):
    with pytest.raises(FileNotFoundError):
        fingerprint.code_digest("mrege")
