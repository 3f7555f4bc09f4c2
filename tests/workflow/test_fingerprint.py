import ast
import json
import shutil
import time
from pathlib import Path

import pytest

from mistral_prune_lora.workflow import fingerprint
from mistral_prune_lora.workflow.fingerprint import Code

LIBRARY = Path(fingerprint.__file__).parents[1]
SCRIPTS = LIBRARY.parents[1] / "workflow_scripts"
RUN = "from mistral_prune_lora.models.load import load_model\n\nload_model\n"
MERGE = "from mistral_prune_lora.merging.merge import merge_adapters\n\nmerge_adapters\n"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library's sources that a test may edit."""
    root = tmp_path / "mistral_prune_lora"
    shutil.copytree(LIBRARY, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "_ROOT", root)
    return root


@pytest.fixture
def script(tmp_path):
    """Writes a script and returns its digest."""

    def write(text):
        (tmp_path / "script.py").write_text(text)
        return Code().digest(tmp_path / "script.py")

    return write


def edit(path, text="\nEDITED = 1\n"):
    path.write_text(path.read_text() + text)


def test_an_edit_changes_the_digest_of_what_imports_it_and_of_nothing_else(library, script):
    merge, run = script(MERGE), script(RUN)
    edit(library / "models/load.py")
    assert script(MERGE) == merge and script(RUN) != run
    edit(library / "storage/safetensors_file.py")
    assert script(MERGE) != merge


def test_an_import_within_a_function_or_from_a_package_counts(library, script):
    inside = (
        "def late():\n    if True:\n        from mistral_prune_lora.sizes import parse_size\n    return parse_size\n"
    )
    for text in (inside, "from mistral_prune_lora import sizes\n", "import mistral_prune_lora.sizes\n"):
        before = script(text)
        edit(library / "sizes.py")
        assert script(text) != before


def test_comments_docstrings_and_layout_do_not_count(library, script):
    before = script(RUN)
    edit(library / "models/load.py", "\n# a comment\n\n\n")
    text = (library / "models/load.py").read_text()
    assert '"""Load a model directory' in text
    edited = text.replace('"""Load a model directory', '"""Another word').replace(
        "path: str | Path,", "path: (str|Path),"
    )
    (library / "models/load.py").write_text(edited.replace('"""Whole models', '"""Half models'))
    assert edited != text and script("# what it does\n" + RUN) == before
    assert script('"""What it does."""\n' + RUN) == before


def test_a_text_that_is_no_docstring_counts(script):
    texts = ["x = 1", "x = 2", "'doc'\nx = 'one'", "'doc'\nx = 'two'", "x = 1\n'two'", "def f(a='one'): 'doc'"]
    assert len({script(text) for text in [*texts, "def f(a='two'): 'doc'"]}) == len(texts) + 1
    assert script("def f(a='one'): 'other'") == script("def f(a='one'): 'doc'")


def test_wording_and_display_and_what_is_refused_do_not_count(library, script):
    before = script(MERGE)
    for name in ("console", "errors", "provenance", "checkpoints/families"):
        edit(library / f"{name}.py")
    assert script(MERGE) == before


@pytest.mark.parametrize("module", ["mrege", "pruning.mrege", "merging.merge.deeper"])
def test_a_module_that_is_not_there_is_an_error(script, module):
    for text in (f"from mistral_prune_lora.{module} import x", f"import mistral_prune_lora.{module}"):
        with pytest.raises(FileNotFoundError, match="no module mistral_prune_lora"):
            script(text)


def test_a_script_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Code().digest(tmp_path / "none.py")


def test_every_script_of_the_workflow_has_a_digest_of_its_own_and_soon(library):
    scripts = sorted(SCRIPTS.glob("*.py"))
    started = time.process_time()
    code = Code()
    digests = {code.digest(script) for script in scripts}
    assert time.process_time() - started < 3  # about 0.5 s here; once for each script would be 4
    assert len(digests) == len(scripts) > 10


def test_what_was_read_is_remembered_by_content_and_gives_the_same_digests(library, tmp_path, monkeypatch):
    memory, scripts = tmp_path / "memory/code.json", sorted(SCRIPTS.glob("*.py"))

    def digests():
        code = Code(memory)
        found = [code.digest(script) for script in scripts]
        code.keep()
        return found

    first = digests()
    parsed = []
    monkeypatch.setattr(fingerprint, "_parse", lambda source, real=fingerprint._parse: parsed.append(1) or real(source))
    assert digests() == first and not parsed
    edit(library / "merging/merge.py")
    edited = digests()
    assert edited != first and len(parsed) == 1
    memory.unlink()
    assert digests() == edited


@pytest.mark.parametrize("kept", [b"", b"{", b"[]", b'{"reader": 1}', b"SOURCES", b"READER"])
def test_a_memory_that_is_none_is_begun_anew(tmp_path, kept):
    memory, script = tmp_path / "code.json", SCRIPTS / "prune.py"
    code = Code(memory)
    digest = code.digest(script)
    code.keep()
    whole = json.loads(memory.read_text())
    spoilt = {b"SOURCES": whole | {"sources": [1]}, b"READER": whole | {"reader": "of another Python"}}
    memory.write_bytes(json.dumps(spoilt[kept]).encode() if kept in spoilt else kept)
    again = Code(memory)
    assert again.digest(script) == digest
    again.keep()
    assert json.loads(memory.read_text()) == whole


def test_a_package_s_init_holds_nothing_but_its_docstring():
    inits = list(LIBRARY.rglob("__init__.py"))
    assert len(inits) > 1
    for init in inits:
        (only,) = ast.parse(init.read_text()).body
        assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), init


def test_no_module_reads_a_docstring():
    for file in [*LIBRARY.rglob("*.py"), *SCRIPTS.glob("*.py")]:
        tree = ast.parse(file.read_text())
        names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(tree)}
        assert not names & {"__doc__", "getdoc", "get_docstring"} or file == Path(fingerprint.__file__), file


def test_what_does_not_count_is_there():
    for name in fingerprint._WITHOUT_EFFECT:
        assert fingerprint._path(name).is_file()
