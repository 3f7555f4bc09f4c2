"""Windows of any dataset: cut across a running text, or made of examples of which only some tokens are scored."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mistral_prune_lora.errors import DataError, printable
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.examples import Example, examples_of
from mistral_prune_lora.text.hub_rows import Rows, open_rows
from mistral_prune_lora.text.packing import laid_out, placed
from mistral_prune_lora.text.sources import Text, load_text
from mistral_prune_lora.text.windows import (
    Windows,
    WindowsIdentity,
    check_amount,
    ids_digest,
    make_windows,
    scored_digest,
    tokenizer_digest,
)

_TOO_LONG, _NO_ANSWER = "whose answer alone is too long", "without an answer"


def dataset_windows(spec: DatasetSpec, tokenizer, *, seqlen: int, count: int | None) -> Windows:
    """The windows of a dataset.

    Args:
        spec: the dataset.
        tokenizer: a transformers tokenizer.
        seqlen: token ids in a window.
        count: of a running text, windows at most; of examples, examples at most, however many stand in a window. None
            takes all.

    Raises:
        DataError: the dataset contradicts itself, is not there or cannot be read, has not what its shape asks for, or
            holds nothing to learn.
    """
    spec.check()
    check_amount(seqlen, count)
    if spec.streaming and count is None:
        raise DataError(
            "a stream has no end that is known",
            where="streaming",
            mend="say how many windows or examples to take of it",
        )
    if spec.is_plain:
        return make_windows(load_text(**spec.running_text), tokenizer, seqlen=seqlen, max_windows=count)
    rows = open_rows(spec)
    if spec.is_examples:
        return _example_windows(spec, rows, tokenizer, seqlen, count)
    return _joined_windows(spec, rows, tokenizer, seqlen, count)


def _joined_windows(spec: DatasetSpec, rows: Rows, tokenizer, seqlen: int, count: int | None) -> Windows:
    """Windows across texts; of a stream, no more texts are read than it takes."""
    found = (_text(row, spec.column, rows.source) for row in rows.rows)
    left = (text for text in found if text is not None)
    if not spec.streaming or count is None:
        return make_windows(_joined(spec, rows, list(left)), tokenizer, seqlen=seqlen, max_windows=count)
    read: list[str] = []
    tokens, wanted = 0, count * seqlen
    while True:
        for text in left:
            read.append(text)
            # At its edges a text may be cut into tokens otherwise when others stand beside it.
            tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) - 1
            if tokens >= wanted:
                break
        windows = make_windows(_joined(spec, rows, read), tokenizer, seqlen=seqlen, max_windows=count)
        if len(windows) == count or tokens < wanted:
            return windows
        wanted += seqlen


def _joined(spec: DatasetSpec, rows: Rows, texts: list[str]) -> Text:
    joined = rows.separator.join(texts)
    try:
        digest = hashlib.sha256(joined.encode()).hexdigest()
    except UnicodeEncodeError:
        raise DataError("a text holds half a surrogate pair", where=rows.source, mend="leave it out") from None
    return Text(rows.name, spec.split, joined, digest, rows.source)


def _text(row: Mapping, column: str, source: str) -> str | None:
    if column not in row:
        raise DataError(
            f"there is no column {column!r}, only {', '.join(map(repr, row))}",
            where=source,
            mend="name the column that holds the text",
        )
    if row[column] is not None and not isinstance(row[column], str):
        raise DataError(f"column {column} holds {type(row[column]).__name__}, not text", where=source)
    return row[column]


@dataclass
class _Taken:
    """The examples that are used, and why others are not."""

    examples: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    digest: str = ""


def _example_windows(spec: DatasetSpec, rows: Rows, tokenizer, seqlen: int, count: int | None) -> Windows:
    taken = _take(examples_of(rows.rows, spec, tokenizer, seqlen), seqlen, count)
    _say(taken, rows.name, seqlen)
    if not taken.examples:
        raise DataError(
            f"of {sum(taken.left_out.values())} rows none makes an example of {seqlen} tokens",
            where=rows.source,
            mend="use a larger seqlen, or look at what the columns hold",
        )
    order = placed([len(example.ids) for example in taken.examples], seqlen, packing=spec.packing)
    fill = 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ids, positions, scored = laid_out(taken.examples, order, seqlen, padding=fill, left=spec.padding_side == "left")
    identity = WindowsIdentity(
        dataset=rows.name,
        split=spec.split,
        source=rows.source,
        text_sha256=taken.digest,
        ids_sha256=ids_digest(ids, positions),
        tokenizer=str(tokenizer.name_or_path),
        tokenizer_sha256=tokenizer_digest(tokenizer),
        utf8_bytes=taken.nbytes,
        seqlen=seqlen,
        windows=len(ids),
        text_windows=len(ids),
        scored_sha256=scored_digest(scored),
        examples=_told(spec, rows, taken, tokenizer),
    )
    return Windows(ids, identity, positions, scored)


def _take(examples: Iterable[Example], seqlen: int, count: int | None) -> _Taken:
    """The first examples that fit, so many at most."""
    taken, digest = _Taken(), hashlib.sha256()
    for example in examples:
        if len(taken.examples) == count:
            break
        fitted = example.fitted(seqlen) if example.answers else None
        if fitted is None:
            taken.left_out[_TOO_LONG if example.answers else _NO_ANSWER] += 1
            continue
        digest.update(f"{example.text}\n".encode())
        taken.nbytes += sum(len(piece.encode()) for piece in json.loads(example.text) if piece)
        # A list takes eight times the room, and a dataset may have a hundred thousand examples.
        taken.examples.append(replace(fitted, ids=np.array(fitted.ids, dtype=np.int32)))
    taken.digest = digest.hexdigest()
    return taken


def _say(taken: _Taken, name: str, seqlen: int) -> None:
    """Say on stderr what of the rows is not learnt."""
    for why, rows in taken.left_out.items():
        print(f"warning: {printable(name)}: rows left out, {why}: {rows}", file=sys.stderr)
    if cut := sum(example.cut for example in taken.examples):
        print(f"note: {printable(name)}: examples cut to {seqlen} tokens: {cut}", file=sys.stderr)


def _told(spec: DatasetSpec, rows: Rows, taken: _Taken, tokenizer) -> dict:
    """How the examples were made, for the record."""
    told: dict = {
        "shape": spec.shape,
        "examples": len(taken.examples),
        "rows": rows.count,
        "left_out": dict(taken.left_out),
        "cut": sum(example.cut for example in taken.examples),
        "packing": spec.packing,
        "padding_side": spec.padding_side,
    }
    if spec.shape == "prompt":
        told["template"] = spec.words.content()
    elif spec.shape == "chat":
        told["chat_template_sha256"] = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    return told
