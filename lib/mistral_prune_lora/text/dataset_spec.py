"""What a dataset is asked for: where its rows are, their shape, and how they become windows. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.presets import PRESETS, Template
from mistral_prune_lora.text.sources import DATASETS, SPLITS
from mistral_prune_lora.text.splits import is_sliced, split_names

SHAPES = ("text", "chat", "prompt")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RUNNING = ("dataset", "split", "mirror", "text_files", "column")


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset, by the keys that a configuration has for it.

    Attributes:
        dataset, split, mirror, text_files, column: as for `sources.load_text`; `dataset` may also be a dataset's id on
            the Hub, and `split` an expression such as `train[:5000]`.
        shape: "text"; "chat", a conversation a row; or "prompt", a prompt and its answer a row.
        documents: of texts, "joined" cuts windows across them, and "each" gives every one a window of its own.
        preset, template: of prompts, the name of a template or the template itself.
        columns: where the template's names, or a chat's "messages", are if not in columns of these names.
        packing: whether several examples go into a window; else each has its own.
        padding_side: where a window's padding is, "right" or "left".
        revision, config: of a dataset on the Hub, its commit, and which of its configurations.
        streaming: read rows one after another, only as far as they are needed.
    """

    dataset: str | None = None
    split: str = "test"
    mirror: str | None = None
    text_files: tuple[str, ...] = ()
    column: str = "text"
    shape: str = "text"
    documents: str = "joined"
    preset: str | None = None
    template: Mapping | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    packing: bool = False
    padding_side: str = "right"
    revision: str | None = None
    config: str | None = None
    streaming: bool = False

    @classmethod
    def of(cls, settings: Mapping) -> DatasetSpec:
        """The dataset of a configuration's settings."""
        return cls(**{**settings, "text_files": tuple(settings.get("text_files", ()))})

    @property
    def is_examples(self) -> bool:
        """Whether its rows are documents of their own, and not one running text."""
        return self.shape != "text" or self.documents == "each"

    @property
    def may_be_on_hub(self) -> bool:
        """Whether it is named as datasets on the Hub are: none of the known texts, and no path that leads somewhere."""
        name = self.dataset or ""
        known = self.text_files or name in DATASETS or os.path.lexists(name)
        return not known and _HUB_ID.fullmatch(name) is not None

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a dataset on the Hub: named as such, and with its commit."""
        return self.may_be_on_hub and self.revision is not None

    @property
    def is_plain(self) -> bool:
        """Whether it is a text that `sources.load_text` reads."""
        return not (self.is_examples or self.is_on_hub or self.streaming or is_sliced(self.split))

    @property
    def running_text(self) -> dict:
        """The arguments of `sources.load_text`."""
        return {name: getattr(self, name) for name in _RUNNING}

    @property
    def recipe(self) -> dict:
        """What decides its windows beside the content of files: nothing that is as it would be if it were not given."""
        defaults = asdict(DatasetSpec())
        told = {name: value for name, value in asdict(self).items() if name not in _RUNNING and value != defaults[name]}
        return {"split": self.split, "column": self.column, **told}

    @cached_property
    def words(self) -> Template:
        """The template of a dataset of prompts.

        Raises:
            DataError: there is none, or it is malformed.
        """
        if self.preset is not None:
            known = PRESETS[self.preset].template
            template = Template(
                known.system, known.prompt, known.answer, known.unanswerable, {**known.columns, **self.columns}
            )
            template.check()
            return template
        if self.template is None:
            raise DataError("there is no template", where="template", mend="give one, or a preset")
        return Template.of(self.template, self.columns)

    @property
    def needed(self) -> list[str]:
        """The columns that its rows must have."""
        if self.shape == "prompt":
            return self.words.needed
        if self.shape == "chat":
            return [self.columns.get("messages", "messages").split(".")[0]]
        return [self.column]

    def check(self) -> None:
        """Raise a DataError for the first of its `faults`."""
        for key, told in self.faults():
            raise DataError(told, where=key)

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) for what contradicts itself; no file is looked at."""
        yield from self._faults_of_rows()
        yield from self._faults_of_shape()
        if not self.is_examples:
            for key in ("packing", "padding_side"):
                if getattr(self, key) != getattr(DatasetSpec(), key):
                    yield key, "windows of a running text are full; documents: each gives every text its own"

    def _faults_of_rows(self) -> Iterator[tuple[str, str]]:
        try:
            named = [] if self.split in SPLITS else split_names(self.split)
        except DataError as error:
            yield "split", f"{error.what}. Write one of {', '.join(SPLITS)}, or rows of one, as train[:5000]"
        else:
            # Of a plain text, whoever reads it says so.
            if self.dataset in DATASETS and not self.is_plain and not set(named) <= set(SPLITS):
                yield "split", f"{self.split!r} is not of {', '.join(SPLITS)}"
        if self.may_be_on_hub and self.revision is None:
            told = f"{self.dataset} is no file or folder here; of a dataset on the Hub, revision must name the commit"
            yield "dataset", f"{told}, 40 hex digits"
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            yield "revision", f"{self.revision!r} is not the 40 hex digits of a commit"
        if not self.may_be_on_hub:
            for key in ("revision", "config"):
                if getattr(self, key) is not None:
                    yield key, "is of a dataset on the Hub alone, named as owner/name"
        if self.streaming and (self.text_files or self.dataset in DATASETS):
            yield "streaming", "is of files and of datasets on the Hub; this text is read whole"
        if self.streaming and is_sliced(self.split):
            yield "split", f"{self.split!r} cannot be read as a stream; name one split, and limit it by windows"

    def _faults_of_shape(self) -> Iterator[tuple[str, str]]:
        if self.shape != "text" and self.documents != "joined":
            yield "documents", f"is of texts, and this is of the shape {self.shape}"
        if self.shape != "text" and (self.text_files or self.dataset in DATASETS):
            yield "shape", f"a text has no rows of the shape {self.shape}"
        if self.shape != "text" and self.column != "text":
            yield "column", "is of texts; columns says where other rows have what"
        if self.shape != "prompt":
            for key in ("preset", "template"):
                if getattr(self, key) is not None:
                    yield key, f"is of the shape prompt, and this is of the shape {self.shape}"
            if unknown := [name for name in self.columns if self.shape == "text" or name != "messages"]:
                yield f"columns.{unknown[0]}", f"the shape {self.shape} has no such name"
        elif (self.preset is None) == (self.template is None):
            yield "template", "needs exactly one of preset and template"
        elif self.preset is not None and self.preset not in PRESETS:
            yield "preset", f"{self.preset!r} is not one of {', '.join(PRESETS)}"
        else:
            try:
                self.words.check()
            except DataError as error:
                yield str(error.where), f"{error.what}. {error.mend}"


def question_dataset(name: str) -> DatasetSpec:
    """The training questions that --qa_dataset names: squad or squad_v2, a file or folder of that shape, or NAME=PATH.

    Raises:
        DataError: it is neither.
    """
    preset, _, path = name.partition("=")
    if preset not in PRESETS:
        preset, path = "squad", name
    if path:
        if not Path(path).exists():
            raise DataError(
                f"{path!r} is no file or folder",
                where="--qa_dataset",
                mend=f"give {', '.join(PRESETS)}, a path, or NAME=PATH for another preset than squad",
            )
        return DatasetSpec(path, "train", shape="prompt", preset=preset)
    known = PRESETS[preset]
    return DatasetSpec(known.repo_id, "train", shape="prompt", preset=preset, revision=known.revision)
