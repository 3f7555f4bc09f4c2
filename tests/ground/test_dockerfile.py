"""The Dockerfile, which no test builds: what it copies is there, and what it installs is pinned in requirements.txt."""

import getpass
import re
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its argument, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def arguments() -> dict[str, str]:
    return dict(value.split("=", 1) for name, value in instructions() if name == "ARG")


def copied() -> list[str]:
    """What it takes from the checkout."""
    return [source for name, value in instructions() if name == "COPY" for source in value.split()[:-1]]


def test_its_python_is_one_exact_version_that_the_package_takes():
    ((_, image),) = [(name, value) for name, value in instructions() if name == "FROM"]
    assert image.startswith("python:${PYTHON}-slim-") and not image.endswith("latest")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", arguments()["PYTHON"])
    assert arguments()["PYTHON"] in SpecifierSet(wanted)


def test_everything_is_installed_as_requirements_pin_it():
    installs = [
        words.split()
        for name, value in instructions()
        if name == "RUN"
        for words in value.split("&&")
        if words.split()[:2] == ["pip", "install"]
    ]
    assert len(installs) == 2
    for words in installs:
        assert words.count("--requirement") == 1 and words[-2] == "--requirement"  # no package is named beside it
    pins = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!-]+", pin) for pin in pins if pin)
    # The index has builds of this version with names such as 2.13.0+cu130, which a pin without one takes.
    assert sum(pin.startswith("torch==") and "+" not in pin for pin in pins) == 1


def test_torch_comes_from_the_index_that_is_asked_for():
    assert arguments()["TORCH_INDEX"] == "https://download.pytorch.org/whl/cpu"
    alone = '--index-url "${TORCH_INDEX}" --requirement /tmp/torch.txt'
    assert sum(alone in value for _, value in instructions()) == 1
    text = (ROOT / "Dockerfile").read_text() + (ROOT / "docs/containers.md").read_text()
    assert all(re.fullmatch(r"cpu|cu\d{3}", index) for index in re.findall(r"download\.pytorch\.org/whl/(\w+)", text))


def test_a_user_whom_nobody_knows_has_a_name_and_a_home(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (each.split("=", 1) for key, told in instructions() if key == "ENV" for each in told.split()):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert getpass.getuser()
    assert Path.home() == Path("/tmp")


def test_what_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and kept == set(copied())
    for source in copied():
        assert (ROOT / source).exists(), source


def test_all_that_the_workflow_runs_is_copied():
    code = "\n".join(path.read_text() for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")])
    named = set(re.findall(r'"(?:\.\./)?([a-z_]+)/[\w.{}/-]+\.(?:smk|py|rst|yaml|css)"', code)) & {
        path.name for path in ROOT.iterdir()
    }
    assert {"rules", "workflow_scripts", "envs", "report"} <= named
    assert named <= set(copied())
