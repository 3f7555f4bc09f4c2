"""A user's folder with one of everything that a command reads, and the commands over it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from cut_model import cut, save_dense
from merge_oracle import edit_json
from tiny import save_adapter, save_tokenizer

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.mistral_eval_ppl_mergedmodel import main as evaluate
from mistral_prune_lora.mistral_optimized_kd_lora import main as train
from mistral_prune_lora.pruning.layeronly_drop import main as prune
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge

LAYOUT = Layout(8, (3, 4), (5, 6))
# Every input has a parent of its own, so that what holds one is not what holds another.
INPUTS = {
    "dense": "1/dense",
    "A": "2/A",
    "B": "3/B",
    "C": "4/C",
    "A_lora": "5/A_lora",
    "B_lora": "6/B_lora",
    "tokenizer": "7/tokenizer",
    "text": "8/eval.txt",
    "mirror": "9/wikitext",
}


@dataclass(frozen=True)
class Command:
    """A command as a user runs it in the folder.

    Attributes:
        main: its function.
        words: its arguments without outputs.
        reads: names in INPUTS.
        outputs: by flag: "directory", "file", "folder" (added to) or "parts" (B and C are written below it).
    """

    main: Callable[[list[str]], int]
    words: tuple[str, ...]
    reads: tuple[str, ...]
    outputs: dict[str, str]

    def run(self, *more: str | Path, **outputs: str | Path) -> int:
        """Run it; outputs by flag without dashes."""
        flags = [word for name, path in outputs.items() for word in (f"--{name}", str(path))]
        return self.main([*self.words, *flags, *map(str, more)])


def flags(text: str) -> tuple[str, ...]:
    """The words of a command line in which {NAME} is an input."""
    return tuple(text.format(**INPUTS).split())


COMMANDS = {
    "merge A": Command(
        merge,
        flags("--base_model {A} --adapter_path {A_lora} --tokenizer_path {tokenizer} --device cpu"),
        ("A", "A_lora", "tokenizer", "dense"),  # dense: the adapter's base
        {"output_dir": "directory"},
    ),
    "merge B": Command(
        merge,
        flags("--base_model {B} --adapter_paths {B_lora} --skeleton {A} --device cpu"),
        ("A", "B", "B_lora"),
        {"output_dir": "directory"},
    ),
    "train": Command(
        train,
        flags(
            "--stage B --teacher {dense} --student {A} --bundle {B} --text_file {text} --seqlen 32 --nsamples 4"
            " --steps 1 --gradient_accumulation 1 --device cpu --dtype fp32 --rank 2"
        ),
        ("dense", "A", "B", "text"),
        {"output_dir": "directory", "teacher_states": "file"},
    ),
    "prune": Command(
        prune,
        flags("--model {dense} --text_file {text} --b_layers 3 4 --c_layers 5 6"),
        ("dense", "text"),
        {"save_dir": "directory", "save_removed_dir": "parts", "prune_log": "file"},
    ),
    "evaluate": Command(
        evaluate,
        flags(
            "--model_path {dense} {A} {B} --c_bundle {C} --lora_paths {A_lora} --tokenizer_path {tokenizer}"
            " --text_file {text} --seqlen 32 --nsamples 2 --device cpu --dtype fp32"
        ),
        ("dense", "A", "B", "C", "A_lora", "tokenizer", "text"),
        {"json": "file", "csv": "file", "work_dir": "folder"},
    ),
    "evaluate a mirror": Command(
        evaluate,
        flags("--model_path {A} --mirror {mirror} --seqlen 32 --nsamples 2 --device cpu --dtype fp32"),
        ("A", "mirror"),
        {"json": "file", "csv": "file", "work_dir": "folder"},
    ),
}


def write_inputs(folder: Path) -> None:
    """One of everything, at the paths of INPUTS."""
    place = {name: folder / path for name, path in INPUTS.items()}
    save_dense(place["dense"], vocab_size=259)
    save_tokenizer(place["dense"])
    a, bundles = cut(place["dense"], LAYOUT, folder / "cut")
    for name, made in (("A", a), *bundles.items()):
        place[name].parent.mkdir()
        made.rename(place[name])
    (folder / "cut/bundles").rmdir()
    (folder / "cut").rmdir()
    for seed, part in enumerate("AB"):
        adapter = place[f"{part}_lora"]
        save_adapter(adapter, place["dense"], list(LAYOUT.layers_of(part)), seed)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=INPUTS["dense"])
    save_tokenizer(place["tokenizer"])
    place["text"].parent.mkdir()
    place["text"].write_text("\n".join(f"Line {i} is about {i * i}." for i in range(60)))
    raw = place["mirror"] / "wikitext-2-raw-v1"
    raw.mkdir(parents=True)
    pd.DataFrame({"text": [f"Row {i}" for i in range(60)]}).to_parquet(raw / "test-00000-of-00001.parquet")


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, link and directory below a folder, with the digest of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content = os.readlink(path)
        else:
            content = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = content
    return found


def record(path: Path) -> dict:
    """A JSON file's content."""
    return json.loads(path.read_text())


def error_line(capsys) -> str:
    """The one line that a command ended with."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert not any("Traceback" in line for line in lines)
    return line
