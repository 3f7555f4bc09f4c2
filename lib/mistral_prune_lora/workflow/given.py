"""What a user brings: dense models, pruned parts, adapters and texts, as the rules read them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.checkpoints.directories import (
    BUNDLE_META,
    INDEX_FILE,
    SINGLE_FILE,
    layer_file_name,
    layer_files,
    weight_files,
)
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG
from mistral_prune_lora.checkpoints.tokenizer import tokenizer_files
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.provenance import record_sha256
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.rows import FORMATS
from mistral_prune_lora.text.sources import DATASETS
from mistral_prune_lora.workflow.artefacts import Source
from mistral_prune_lora.workflow.configuration import fetched_dir
from mistral_prune_lora.workflow.content import Content, one_path


def dense_model(name: str, settings: Mapping, content: Content) -> Source:
    """A dense model: a local one by what its files hold, any other by where it is fetched from.

    Raises:
        PipelineError: a local model's files cannot be read.
    """
    if "path" in settings:
        folder = one_path(settings["path"])
        names = ["config.json", *_weight_names(folder)]
        files = (*(f"{folder}/{name}" for name in names), *(one_path(file) for file in tokenizer_files(folder)))
        return Source(folder, files, content.identity(files, folder), given=True)
    folder = fetched_dir(name)
    fetched = ("config.json", "source.json", *((SINGLE_FILE,) if "pypi" in settings else ()))
    origin = {key: value for key, value in settings.items() if key != "num_layers"}
    return Source(folder, tuple(f"{folder}/{file}" for file in fetched), record_sha256(origin))


def given_part(pruned: Mapping, part: str, layout: Layout, content: Content) -> Source:
    """A part of a pruned model that is given, by what its files hold.

    Raises:
        PipelineError: a file is missing or cannot be read.
    """
    if part == "A":
        folder = one_path(pruned["A"])
        there = [name for name in (PRUNE_LOG,) if Path(folder, name).is_file()]
        names = ["config.json", MANIFEST, *there, *_weight_names(folder)]
        files = tuple(f"{folder}/{name}" for name in names)
    else:
        folder = f"{one_path(pruned['bundles'])}/{part}"
        # Of another writer, names may not be padded and the meta may be missing.
        found = layer_files(folder)
        layers = [str(found.get(i, f"{folder}/{layer_file_name(i)}")) for i in layout.layers_of(part)]
        meta = [f"{folder}/{BUNDLE_META}"] if Path(folder, BUNDLE_META).is_file() else []
        files = (*meta, *layers)
    return Source(folder, files, content.identity(files, folder), given=True)


def given_adapter(path: str, content: Content) -> Source:
    """An adapter that is given, by what the two files hold that decide a merge.

    Raises:
        DataError: one of them is missing or cannot be read.
    """
    folder = one_path(path)
    files = (f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors")
    return Source(folder, files, content.identity(files, folder), given=True)


def text_files(settings: Mapping) -> tuple[str, ...]:
    """The local files that a text is read from; none where it comes with Python or from the Hub."""
    return tuple(file for _, file in _named_files(settings))


def text_identity(settings: Mapping, content: Content) -> str:
    """What a text is read from: the content of local files, in their order, or the name of what is built in or fetched.

    Raises:
        DataError: a file cannot be read.
    """
    dataset = settings.get("dataset")
    told: dict = {"files": [[name, content.sha256(file)] for name, file in _named_files(settings)]}
    if dataset in DATASETS:
        told["dataset"] = dataset
    if DatasetSpec.of(settings).is_on_hub:
        told["hub"] = dataset  # its commit is a setting
    if dataset == "pydoc":
        told["python"] = platform.python_version()  # its text is that of the interpreter
    return record_sha256(told)


def _named_files(settings: Mapping) -> list[tuple[str, str]]:
    """The local files of a text, each with what its reader goes by: its name, and in a folder its place there."""
    dataset = settings.get("dataset")
    named = settings.get("text_files") or [settings.get("mirror") or (None if dataset in DATASETS else dataset)]
    found = []
    for path in (Path(one_path(name)) for name in named if name):
        if path.is_dir():
            # What may hold rows: a README beside them changes nothing.
            rows = sorted(file for file in path.rglob("*") if file.name.endswith((*FORMATS, ".arrow")))
            found += [(os.path.relpath(file, path), os.fspath(file)) for file in rows]
        elif path.is_file():
            found.append((path.name, os.fspath(path)))
    return found


def _weight_names(folder: str) -> tuple[str, ...]:
    """The files that hold a model's weights, and the index that says so where they are shards."""
    names = weight_files(folder)
    return names if SINGLE_FILE in names else (INDEX_FILE, *names)
