"""The texts of a configuration before they are read, and what experiments do with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.glance import glance_at
from mistral_prune_lora.text.hub_rows import check_columns
from mistral_prune_lora.text.sources import DATASETS, SPLITS
from mistral_prune_lora.workflow.configuration import (
    calibration_texts,
    closed_form_parts,
    experiment_layout,
    missing_text,
    started_parts,
    trains,
)
from mistral_prune_lora.workflow.dense_models import DenseModels
from mistral_prune_lora.workflow.findings import Findings

_KNOWN = f"use one of {', '.join(DATASETS)}, or the path of a parquet, json, csv or txt file, or of a folder of such"


def check_texts(config: Mapping, dense: DenseModels, findings: Findings) -> None:
    """Tell what is wrong or doubtful about all texts; of those that no experiment uses, as a doubt only."""
    uses = {name: list(_uses(config, name)) for name in config["experiments"]}
    used = {text for experiment in uses.values() for _, text, _ in experiment}
    lengths = {
        name: _length(f"datasets.{name}", settings, findings, fault=name in used)
        for name, settings in config["datasets"].items()
    }
    specs = {name: DatasetSpec.of(settings) for name, settings in config["datasets"].items()}
    for name, experiment in config["experiments"].items():
        limit = dense.positions(experiment["model"])
        for key, text, seqlen in uses[name]:
            path, length = f"experiments.{name}.{key}.seqlen", lengths[text]
            if limit is not None and seqlen > limit:
                told = f"{seqlen} tokens are more than the {limit} positions that {experiment['model']} was made for"
                findings.tell(path, told, fault=False)
            if length is not None and length < seqlen:
                told = f"the text {text} has {length} bytes, which hardly make one window of {seqlen} tokens"
                findings.tell(path, told, fault=False)
            for wanted, told in _misuse(key, text, specs[text], experiment[key]["windows"]):
                findings.tell(f"experiments.{name}.{key}.{wanted}", told, fault=True)
        _warn_of_one_text(config, name, findings)


def _uses(config: Mapping, name: str) -> Iterator[tuple[str, str, int]]:
    """(section, text, seqlen) for each text that an experiment reads."""
    experiment = config["experiments"][name]
    for text in experiment["perplexity"]["datasets"]:
        yield "perplexity", text, experiment["perplexity"]["seqlen"]
    if trains(experiment, experiment_layout(config, name)):
        yield "distill", experiment["distill"]["dataset"], experiment["distill"]["seqlen"]
    layout = experiment_layout(config, name)
    if closed_form_parts(experiment, layout) or started_parts(experiment, layout):
        for text in calibration_texts(experiment):
            yield "closed_form", text, experiment["closed_form"]["seqlen"]
    if (ranked := experiment["importance"])["dataset"] is not None:
        yield "importance", ranked["dataset"], ranked["seqlen"]
    if (chosen := experiment["choose"])["dataset"] is not None:
        yield "choose", chosen["dataset"], chosen["seqlen"]


def _misuse(section: str, text: str, spec: DatasetSpec, windows: int | None) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) where a section of an experiment cannot use a dataset."""
    if section != "distill" and spec.is_examples:
        shape = spec.shape if spec.shape != "text" else "documents: each"
        told = f"{text} is of the shape {shape}, of which not every token is scored; measure on a running text"
        yield "datasets" if section in ("perplexity", "closed_form") else "dataset", told
    if spec.streaming and windows is None:
        yield "windows", f"{text} is read as a stream, of which a number of windows or examples must be said"


def _length(path: str, settings: Mapping, findings: Findings, *, fault: bool) -> int | None:
    """A text's bytes if it is small and sound; tells what is wrong with it otherwise."""
    wrong = list(_faults(settings))
    for key, told in wrong:
        findings.tell(f"{path}.{key}", told, fault=fault)
    if wrong:
        return None
    spec = DatasetSpec.of(settings)
    with findings.asking(path, fault=fault):
        if spec.is_plain:
            return glance_at(**spec.running_text)
        check_columns(spec)
    return None


def _faults(settings: Mapping) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each path of a text that leads nowhere, and for what contradicts itself."""
    spec = DatasetSpec.of(settings)
    if spec.is_plain and spec.split not in SPLITS:
        yield "split", f"{spec.split!r} is not one of {', '.join(SPLITS)}"
    yield from spec.faults()
    for place, file in enumerate(settings.get("text_files", ())):
        if not os.path.exists(file):
            yield f"text_files.{place}", missing_text(file, "give a UTF-8 text file")
    if settings["mirror"] is not None and not os.path.exists(settings["mirror"]):
        yield (
            "mirror",
            missing_text(settings["mirror"], "give a local copy of the dataset's repository, or leave it out"),
        )
    dataset = settings.get("dataset")
    known = dataset in DATASETS or spec.may_be_on_hub
    if dataset is not None and not known and not os.path.exists(dataset):
        yield "dataset", missing_text(dataset, _KNOWN)


def _warn_of_one_text(config: Mapping, name: str, findings: Findings) -> None:
    """Warn of an experiment that is measured on what it was healed on."""
    experiment, texts, layout = config["experiments"][name], config["datasets"], experiment_layout(config, name)
    healed = {"distill.dataset": [experiment["distill"]["dataset"]] if trains(experiment, layout) else []}
    computed = closed_form_parts(experiment, layout) or started_parts(experiment, layout)
    healed["closed_form.datasets"] = list(calibration_texts(experiment)) if computed else []
    for measured in experiment["perplexity"]["datasets"]:
        for key, text in ((key, text) for key, names in healed.items() for text in names):
            if _meaning(texts[measured]) == _meaning(texts[text]):
                told = f"{measured} is the text of {key}, {text}: what is measured there was learnt by heart"
                findings.tell(f"experiments.{name}.perplexity.datasets", told, fault=False)
                break


def _meaning(settings: Mapping) -> tuple:
    """What decides which text settings stand for: a file of one's own has no split, and C4 has two."""
    if "text_files" in settings:
        return tuple(settings["text_files"])
    dataset, split = settings["dataset"], settings["split"]
    if dataset not in DATASETS and os.path.isfile(dataset):
        split = None
    if dataset == "c4" and split == "test":
        split = "validation"
    return dataset, split, settings["mirror"], None if dataset in DATASETS else settings["column"]
