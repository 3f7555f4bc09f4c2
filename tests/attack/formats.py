"""Kinds of files that commands read: what each row of the table is about, and how its files are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path


class Format(Enum):
    """How a file is written, which says how it can be spoilt."""

    JSON = auto()
    SAFETENSORS = auto()
    LINES = auto()
    PACKED = auto()
    TABLE = auto()
    BINARY = auto()
    GGUF = auto()
    YAML = auto()


@dataclass(frozen=True)
class _About:
    told: str
    form: Format
    path: str  # a regular expression for the path; the first kind that fits is the file's


class Kind(Enum):
    """What a file is for."""

    ACTIVATIONS = _About(
        "stored activations, the teacher's too", Format.SAFETENSORS, r"out/(work/.+|states)\.safetensors"
    )
    UNFINISHED = _About("unfinished activations", Format.BINARY, r"out/.+\.partial")
    JOURNAL = _About("scores and journals", Format.LINES, r"out/.+\.(scores|journal)")
    TABLE_OF_RESULTS = _About("a former table of results (CSV)", Format.LINES, r"out/.+\.csv")
    RECORD = _About("records in former results (JSON)", Format.JSON, r"out/.+\.json")
    FORMER_WEIGHTS = _About("weights in former results", Format.SAFETENSORS, r"out/.+\.safetensors")
    MODEL_CONFIG = _About("a model's configuration", Format.JSON, r".+/(generation_)?config\.json")
    ADAPTER_CONFIG = _About("an adapter's configuration", Format.JSON, r".+/adapter_config\.json")
    TOKENIZER = _About("a tokenizer", Format.JSON, r".+/tokenizer(_config)?\.json")
    SAVED = _About("a saved data set: its descriptions", Format.JSON, r".+/saved/.+\.json")
    ARROW = _About("a saved data set: its rows (Arrow)", Format.BINARY, r".+\.arrow")
    ARRAY = _About("texts as a JSON array", Format.LINES, r".+/texts/rows\.json")
    DESCRIPTION = _About("manifests, bundles' lists, logs, indices", Format.JSON, r".+\.json")
    ADAPTER_WEIGHTS = _About("an adapter's weights", Format.SAFETENSORS, r".+/adapter_model\.safetensors")
    WEIGHTS = _About("a model's weights", Format.SAFETENSORS, r".+\.safetensors")
    GGUF = _About("a model in a GGUF file", Format.GGUF, r".+\.gguf")
    TEXT = _About("a text", Format.LINES, r".+\.txt")
    ROWS = _About("texts as JSON lines", Format.LINES, r".+\.jsonl")
    PACKED = _About("texts as packed JSON lines", Format.PACKED, r".+\.gz")
    CSV = _About("texts as CSV", Format.LINES, r".+\.csv")
    PARQUET = _About("texts as parquet", Format.TABLE, r".+\.parquet")
    CONFIGURATION = _About("the workflow's configuration (YAML)", Format.YAML, r".+\.yaml")


def kind_of(file: str | Path) -> Kind:
    """What the file at a path in the project's folder is for."""
    return next(kind for kind in Kind if re.fullmatch(kind.value.path, str(file)))
