"""Every command says on stderr, before anything else, which package runs; stdout is not touched."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mistral_prune_lora
from mistral_prune_lora.provenance import VERSION, package_line

ROOT = Path(__file__).parents[2]
PACKAGE = Path(mistral_prune_lora.__file__).parent
COMMANDS = sorted(
    ".".join(("mistral_prune_lora", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__main__")
    for path in PACKAGE.rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)


def run(command, *arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", command, *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_commands_of_the_guide_are_among_those_found():
    named = ("pruning.layeronly_drop", "pruning.mistral_merge_adapter", "mistral_optimized_kd_lora")
    assert {f"mistral_prune_lora.{name}" for name in (*named, "mistral_eval_ppl_mergedmodel")} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_on_stderr_is_version_and_place(command, tmp_path):
    told = f"mistral-prune-lora {VERSION} ({PACKAGE.resolve()})\n"
    helped = run(command, "--help", cwd=tmp_path)
    assert helped.returncode == 0 and helped.stderr == told
    assert helped.stdout.startswith("usage: ")
    refused = run(command, "--no_such_flag", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith(told) and not refused.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_threads_are_told_how_to_wait_before_torch_is_there(command, monkeypatch):
    module = f"{command}.__main__" if command.endswith((".dense", ".closed_form")) else command
    asked = f"""
import contextlib, importlib, os, sys
main = importlib.import_module({module!r}).main
assert "torch" not in sys.modules
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
    main(["--help"])
print(os.environ["OMP_WAIT_POLICY"])
"""
    for told, kept in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if told:
            monkeypatch.setenv("OMP_WAIT_POLICY", told)
        ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, f"{kept}\n"), ran.stderr


def test_other_scripts_of_the_same_name_in_the_working_directory_are_not_taken_for_the_package(tmp_path):
    """A folder without __init__.py loses against the installed package; the first line says which one runs."""
    theirs = tmp_path / "mistral_prune_lora"
    theirs.mkdir()
    (theirs / "mistral_eval_ppl_mergedmodel.py").write_text('print("theirs")\n')
    done = run("mistral_prune_lora.mistral_eval_ppl_mergedmodel", "--help", cwd=tmp_path)
    assert "theirs" not in done.stdout
    assert done.stderr.splitlines()[0] == package_line() and str(tmp_path) not in done.stderr


def test_the_version_is_written_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "mistral_prune_lora.provenance.VERSION"
