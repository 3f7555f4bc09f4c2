"""Examples: rows of a dataset as token ids, of which only some are scored: answers, or all of a document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.presets import Template

_AT_ONCE = 256  # rows that are tokenised together


@dataclass(frozen=True)
class Example:
    """One document of a dataset.

    Attributes:
        ids: its token ids.
        answers: (first, behind the last) of the ids that are scored, ascending; none where the row has no answer.
        head: how many ids at its beginning are the tokenizer's own; they stay when it is cut.
        text: what it was made of, as a line of JSON.
        cut: whether some of it was left away.
    """

    ids: Sequence[int] | np.ndarray
    answers: Sequence[tuple[int, int]]
    head: int
    text: str
    cut: bool = False

    def fitted(self, seqlen: int) -> Example | None:
        """With at most so many ids: what stands before the last answer is cut from the left, never that answer.

        An earlier answer that loses its beginning is scored no more. None if the last answer does not fit, together
        with the token that its first one is predicted from.
        """
        excess = len(self.ids) - seqlen
        if excess <= 0:
            return self
        first_kept = self.head + excess
        if first_kept > self.answers[-1][0] or (first_kept == self.answers[-1][0] and not self.head):
            return None
        ids = [*self.ids[: self.head], *self.ids[first_kept:]]
        answers = [(first - excess, end - excess) for first, end in self.answers if first >= first_kept]
        return replace(self, ids=ids, answers=answers, cut=True)


def examples_of(rows: Iterable[Mapping], spec: DatasetSpec, tokenizer, seqlen: int) -> Iterator[Example]:
    """The examples of rows, in their order; of prompts and conversations, at their whole length.

    Args:
        rows: with their columns by name.
        spec: says their shape.
        tokenizer: a transformers tokenizer.
        seqlen: documents are cut to so many ids.

    Raises:
        DataError: a row has not what the shape asks for, or the tokenizer cannot do it.
    """
    codec = Codec(tokenizer)
    if spec.shape == "prompt":
        return _prompts(rows, spec.words, codec)
    if spec.shape == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template to write a conversation with",
                where=str(tokenizer.name_or_path),
                mend="use a model with one, or put the rows into the shape prompt",
            )
        return _chats(rows, spec.columns.get("messages", "messages"), codec)
    return _documents(rows, spec.column, codec, seqlen)


class Codec:
    """A tokenizer whose own tokens, before and behind a text, are known.

    Attributes:
        tokenizer: a transformers tokenizer.
        head, tail: what it puts before and behind a text.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        bare, framed = self([_PROBE])[0], tokenizer(_PROBE, verbose=False)["input_ids"]
        places = range(len(framed) - len(bare) + 1)
        start = next((i for i in places if framed[i : i + len(bare)] == bare), None)
        if start is None:
            raise DataError("the tokenizer's own tokens cannot be told from a text's", where=tokenizer.name_or_path)
        self.head, self.tail = framed[:start], framed[start + len(bare) :]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, without tokens of the tokenizer's own."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    @property
    def end(self) -> int:
        """The token that ends a text; DataError if there is none."""
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no token that ends an answer",
                where=str(self.tokenizer.name_or_path),
                mend="give it an eos_token",
            )
        return self.tokenizer.eos_token_id


_PROBE = "text"


def _prompts(rows: Iterable[Mapping], template: Template, codec: Codec) -> Iterator[Example]:
    head, end = codec.head, codec.end
    for batch in _batches(rows):
        told = [(number, *_of_row(number, template.render, row)) for number, row in batch]
        lines = [_line(*each) for each in told]
        starts = codec([prompt for _, prompt, _ in told])
        wholes = codec([prompt + (answer or "") for _, prompt, answer in told])
        for (number, _, answer), text, start, whole in zip(told, lines, starts, wholes, strict=True):
            if answer is None:
                yield Example([*head, *whole], (), len(head), text)
                continue
            if whole[: len(start)] != start:
                raise DataError(
                    f"row {number}: the tokenizer joins the end of the prompt and the beginning of the answer",
                    where="template",
                    mend="begin the answer with a blank or a line break, and end the prompt without one",
                )
            ids = [*head, *whole, end]
            yield Example(ids, ((len(head) + len(start), len(ids)),), len(head), text)


def _documents(rows: Iterable[Mapping], column: str, codec: Codec, seqlen: int) -> Iterator[Example]:
    for batch in _batches(rows):
        texts = [(number, _of_row(number, _text, row, column)) for number, row in batch]
        lines = [_line(*each) for each in texts]
        for line, bare in zip(lines, codec([text for _, text in texts]), strict=True):
            ids = [*codec.head, *bare, *codec.tail] if bare else []
            answers = ((1, min(len(ids), seqlen)),) if len(ids) > 1 else ()
            yield Example(ids[:seqlen], answers, len(codec.head), line, len(ids) > seqlen)


def _text(row: Mapping, column: str) -> str:
    if column not in row:
        raise DataError(f"there is no column {column!r}, only {', '.join(row)}", mend="name the column of the text")
    if row[column] is not None and not isinstance(row[column], str):
        raise DataError(f"the column {column!r} holds {type(row[column]).__name__}, not text")
    return row[column] or ""


def _chats(rows: Iterable[Mapping], column: str, codec: Codec) -> Iterator[Example]:
    for number, row in enumerate(rows, start=1):
        messages = _of_row(number, _messages, row, column)
        yield _of_row(number, _chat, messages, number, codec)


def _messages(row: Mapping, column: str) -> list[dict]:
    """A conversation, without the keys that a table has for other rows alone."""
    found: object = row
    for key in column.split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise DataError(
                f"there is no column {column!r}, only {', '.join(row)}", mend="say with columns where it is"
            )
        found = found[key]
    if not isinstance(found, list) or not found or not all(isinstance(turn, Mapping) for turn in found):
        raise DataError(f"the column {column!r} holds no list of messages", mend="give role and content of each")
    messages = [{key: value for key, value in turn.items() if value is not None} for turn in found]
    for turn in messages:
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content", ""), str):
            raise DataError(
                f"a message has the keys {', '.join(turn)}", mend="give role and content, both of them texts"
            )
    return messages


def _chat(messages: list[dict], number: int, codec: Codec) -> Example:
    """A conversation up to its last answer; the answers are what the template adds for each turn of the assistant."""
    whole = _rendered(messages, codec)
    line = _line(number, whole)
    ids = codec([whole])[0]
    answers = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = codec([_rendered(messages[:turn], codec, asking=True)])[0] if turn else []
        behind = codec([_rendered(messages[: turn + 1], codec)])[0]
        if ids[: len(behind)] != behind or behind[: len(before)] != before:
            raise DataError(
                f"the chat template writes the answer of message {turn + 1} otherwise when the conversation goes on, so"
                " that its tokens cannot be told",
                mend="use a template that only ever adds to what stands there, or conversations with one answer",
            )
        end = _behind_last_special(behind, len(before), codec)
        if end > max(len(before), 1):
            answers.append((max(len(before), 1), end))
    head = 1 if ids and ids[0] == codec.tokenizer.bos_token_id else 0
    return Example(ids[: answers[-1][1]] if answers else ids, answers, head, line)


def _behind_last_special(ids: Sequence[int], first: int, codec: Codec) -> int:
    """Where an answer ends: behind the token that ends its turn, whatever line break follows."""
    special = set(codec.tokenizer.all_special_ids)
    return next((i + 1 for i in range(len(ids) - 1, first - 1, -1) if ids[i] in special), len(ids))


def _rendered(messages: list[dict], codec: Codec, *, asking: bool = False) -> str:
    try:
        return codec.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
    except Exception as error:  # whatever the template raises, or the engine that runs it
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the chat template does not take it: {told}", mend="leave it out, or change its roles"
        ) from None


def _batches(rows: Iterable[Mapping]) -> Iterator[list[tuple[int, Mapping]]]:
    """Rows with their numbers, some at a time."""
    numbered = enumerate(rows, start=1)
    while batch := list(islice(numbered, _AT_ONCE)):
        yield batch


def _of_row(number: int, work, *given):
    """What some work makes of a row, whose number its errors name."""
    try:
        return work(*given)
    except DataError as error:
        raise DataError(f"row {number}: {error.what}", where=error.where, mend=error.mend) from None


def _line(number: int, *texts: str | None) -> str:
    """Texts as one line of JSON; DataError for what is no Unicode."""
    line = json.dumps(texts, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        raise DataError(f"row {number} holds half a surrogate pair", mend="leave it out") from None
    return line
