import ast
import shutil
from pathlib import Path

import pytest

from mistral_prune_lora.workflow import fingerprint

LIBRARY = Path(fingerprint.__file__).parents[1]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library's sources that a test may edit."""
    root = tmp_path / "mistral_prune_lora"
    shutil.copytree(LIBRARY, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "_ROOT", root)
    fingerprint._imports.cache_clear()
    yield root
    fingerprint._imports.cache_clear()


def edit(path):
    path.write_text(path.read_text() + "\n# edited\n")
    fingerprint._imports.cache_clear()


def test_an_edit_changes_the_digest_of_what_imports_it_and_of_nothing_else(library):
    merge, model = fingerprint.code_digest("merging.merge"), fingerprint.code_digest("models.load")
    edit(library / "models/load.py")
    assert fingerprint.code_digest("merging.merge") == merge
    assert fingerprint.code_digest("models.load") != model
    edit(library / "storage/safetensors_file.py")
    assert fingerprint.code_digest("merging.merge") != merge


def test_wording_and_display_and_what_is_refused_do_not_count(library):
    before = fingerprint.code_digest("merging.merge")
    edit(library / "console.py")
    edit(library / "errors.py")
    edit(library / "provenance.py")
    edit(library / "checkpoints/families.py")
    assert fingerprint.code_digest("merging.merge") == before


@pytest.mark.parametrize("name", ["mrege", "pruning", ""])
def test_a_module_that_is_not_there_and_a_package_are_errors(library, name):
    with pytest.raises(FileNotFoundError):
        fingerprint.code_digest(name)


def test_an_edit_behind_a_package_counts(library):
    before = fingerprint.code_digest("pruning.layeronly_drop")
    edit(library / "pruning/data.py")
    assert fingerprint.code_digest("pruning.layeronly_drop") != before


def test_a_package_s_init_holds_nothing_but_its_docstring():
    inits = list(LIBRARY.rglob("__init__.py"))
    assert len(inits) > 1
    for init in inits:
        (only,) = ast.parse(init.read_text()).body
        assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), init


def test_what_does_not_count_is_there():
    for name in fingerprint._WITHOUT_EFFECT:
        assert fingerprint._path(name).is_file()
