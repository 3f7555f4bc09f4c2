"""Fixtures that several rooms of tests share: a tiny random model, and a user's project around one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported, and for subprocesses too: tiny matrices gain nothing from threads, and threads that wait for
# each other on a busy machine take a hundred times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from made_once import made_once
from output_project import write_inputs
from tiny import save_adapter, save_tokenizer, tiny_config
from transformers import MistralForCausalLM
from workflow_project import Project, configuration

from mistral_prune_lora.layout.partition import Layout


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: a test's name must be the same in every process that collects it."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs snakemake or the campaign comes first, or at the end one process would be left with all of it."""
    slow = [Path(__file__).parent / folder for folder in ("workflow", "attack", "cluster")]
    items.sort(key=lambda item: item.path.parent not in slow)


@pytest.fixture
def layout() -> Layout:
    """B holds layers 3 and 4, C holds 5 and 6."""
    return Layout(8, (3, 4), (5, 6))


@pytest.fixture
def dense_dir(tmp_path: Path) -> Path:
    """A dense random bf16 model as transformers saves it, without a tokenizer."""
    torch.manual_seed(0)
    model = MistralForCausalLM(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def mount() -> Iterator[Callable[..., Path]]:
    """Mounts something on a directory for the length of a test; the test is skipped where the user may not."""
    mounted: list[Path] = []

    def mount(place: Path, *options: str) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["mount", *options, str(place)], capture_output=True).returncode != 0:
            pytest.skip("this user may not mount")
        mounted.append(place)
        return place

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def one_of_everything(tmp_path_factory) -> Path:
    """What output_project.INPUTS names."""
    folder = tmp_path_factory.mktemp("everything")
    write_inputs(folder)
    return folder


@pytest.fixture
def user_folder(one_of_everything: Path, tmp_path: Path, monkeypatch) -> Path:
    """The working directory, with one of everything. Not to be changed: what a test writes goes to tmp_path."""
    monkeypatch.chdir(one_of_everything)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return one_of_everything


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """What a user has before the first run: a dense model, a text, an adapter a part, two more."""
    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    model = MistralForCausalLM(tiny_config(vocab_size=259)).to(torch.bfloat16)
    model.save_pretrained(folder / "dense")
    save_tokenizer(folder / "dense")
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(200)]
    (folder / "corpus.txt").write_text("\n".join(sentences))
    for seed, (name, layers) in enumerate(
        {"A": [0, 1, 2, 7], "B": [3, 4], "C": [5, 6], "other_B": [3, 4], "other_C": [5, 6]}.items()
    ):
        save_adapter(folder / "adapters" / name, folder / "dense", layers, seed)
    return folder


@pytest.fixture
def project(assets: Path, tmp_path: Path) -> Project:
    """A project in which nothing was run yet."""
    shutil.copytree(assets, tmp_path / "project")
    return Project(tmp_path / "project", configuration())


@pytest.fixture(scope="session")
def first_run(assets: Path, tmp_path_factory) -> tuple[Project, dict[str, int]]:
    """A project after its first run, and the jobs of that run. Not to be changed: tests work on copies."""

    def run(folder: Path) -> dict[str, int]:
        shutil.copytree(assets, folder, dirs_exist_ok=True)
        return Project(folder, configuration()).jobs()

    folder, jobs = made_once(tmp_path_factory, "first", run)
    return Project(folder, configuration()), jobs


@pytest.fixture
def finished(first_run, tmp_path: Path) -> Project:
    """A copy of a project after its first run; files keep their times, so snakemake finds nothing to do."""
    # With its links, which shutil.copytree would make files of their own.
    subprocess.run(["cp", "-a", first_run[0].folder, tmp_path / "project"], check=True)
    return Project(tmp_path / "project", configuration())
