"""Calibration windows and the evaluation text as token ids, in the shapes that GPTQ- and Wanda-style code expects."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.sources import Text, load_documents, load_text

IGNORED = -100  # the target that cross-entropy skips


@dataclass(frozen=True)
class TestEncoding:
    """The evaluation text as one row of token ids.

    Attributes:
        input_ids: int64, shape (1, tokens).
        text: the text that they are the ids of.
    """

    __test__ = False  # no test class, whatever its name tells pytest

    input_ids: torch.Tensor
    text: Text


def get_loaders(
    name: str,
    *,
    nsamples: int = 256,
    seed: int = 0,
    seqlen: int = 2048,
    tokenizer,
    mirror: str | Path | None = None,
    text_files: Sequence[str | Path] = (),
    column: str = "text",
    splits: Iterable[str] = ("train", "test"),
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]] | None, TestEncoding | None]:
    """Random training windows for calibration, and the ids of the evaluation text.

    Everything but the name goes by keyword: `get_loaders(name, tokenizer)` would otherwise ask for `tokenizer` many
    samples and measure nothing.

    The windows are those of the GPTQ reference loader for the same ids: Python's generator seeded with `seed` draws one
    start a window. For c4 a document longer than a window is drawn first, because its documents are not one text.

    Args:
        name: a dataset as for `sources.load_text`.
        nsamples: how many training windows.
        seed: of the generator that draws them.
        seqlen: token ids in a window.
        tokenizer: a transformers tokenizer.
        mirror, text_files, column: as for `sources.load_text`.
        splits: what to load: "train" and one of "test" and "validation", or just one of them. A split that is not
            asked for need not exist.

    Returns:
        trainloader: `nsamples` pairs (input_ids, targets), int64, each of shape (1, seqlen); every target but the last
            is -100, so that a loss looks at the last token only. None if "train" is not among `splits`.
        testenc: an object with `.input_ids`, int64, shape (1, tokens), not cut into windows, at most as long as the
            dataset's evaluation protocol looks at (c4: 256 windows). None if only "train" is asked for.

    Raises:
        DataError: as for `load_text`; the training text is not longer than a window; no window is asked for.
    """
    if nsamples < 1 or seqlen < 2:
        raise DataError(
            f"{nsamples} windows of {seqlen} tokens hold nothing to predict",
            where="nsamples, seqlen",
            mend="ask for at least one window of at least two tokens",
        )
    wanted = set(splits)
    if not wanted or len(wanted - {"train"}) > 1:
        raise DataError(
            f"{sorted(wanted)} are not the splits of a calibration",
            where="splits",
            mend='give one or both of "train" and an evaluation split',
        )
    source: dict[str, Any] = {"mirror": mirror, "text_files": text_files, "column": column}
    trainloader = testenc = None
    if "train" in wanted:
        draw = random.Random(seed)
        documents = load_documents(name, split="train", **source)
        if documents.name == "c4":
            long = _DocumentIds(documents.rows, tokenizer, seqlen, documents.source)
            trainloader = [_window(long.draw(draw), seqlen, draw) for _ in range(nsamples)]
        else:
            ids = token_ids(documents.joined(), tokenizer)
            if len(ids) <= seqlen:
                raise DataError(
                    f"the training text has {len(ids)} tokens, not more than one window of {seqlen}",
                    where=documents.source,
                    mend="use a longer text or a smaller seqlen",
                )
            trainloader = [_window(ids, seqlen, draw) for _ in range(nsamples)]
    for split in sorted(wanted - {"train"}):
        text = load_text(name, split=split, **source)
        ids = token_ids(text.text, tokenizer)
        limit = None if text.max_windows is None else text.max_windows * seqlen
        testenc = TestEncoding(ids[:limit].unsqueeze(0), text)
    return trainloader, testenc


def token_ids(text: str, tokenizer) -> torch.Tensor:
    """The ids of a text tokenised at once, with the special tokens that the tokenizer adds; int64, shape (tokens,)."""
    # By key: iterating over the encoding would give the names of its fields.
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _window(ids: torch.Tensor, seqlen: int, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    start = draw.randint(0, len(ids) - seqlen - 1)
    window = ids[start : start + seqlen].clone().unsqueeze(0)
    targets = window.clone()
    targets[:, :-1] = IGNORED
    return window, targets


class _DocumentIds:
    """Draws documents that are longer than a window; tokenises each at most once."""

    def __init__(self, rows: list[str], tokenizer, seqlen: int, source: str) -> None:
        self.rows, self.tokenizer, self.seqlen, self.source = rows, tokenizer, seqlen, source
        self.long: dict[int, torch.Tensor] = {}
        self.short: set[int] = set()

    def draw(self, generator: random.Random) -> torch.Tensor:
        while len(self.short) < len(self.rows):
            index = generator.randint(0, len(self.rows) - 1)
            if index in self.short:
                continue
            if index not in self.long:
                ids = token_ids(self.rows[index], self.tokenizer)
                if len(ids) <= self.seqlen:
                    self.short.add(index)
                    continue
                self.long[index] = ids
            return self.long[index]
        raise DataError(
            f"none of {len(self.rows)} documents is longer than a window of {self.seqlen} tokens",
            where=self.source,
            mend="use a smaller seqlen",
        )
