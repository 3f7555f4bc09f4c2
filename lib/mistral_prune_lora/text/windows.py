"""Windows: the blocks of token ids that perplexity is measured and adapters are trained on, and what identifies them.

A text is tokenised once as a whole and cut into non-overlapping windows; the remainder is dropped. Windows may also
hold documents of their own, beside each other, of which only some tokens are scored. A saved file holds all of it and,
in its metadata, where it came from, so that a number can always be traced to its tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mistral_prune_lora.checkpoints.tokenizer import tokenizer_identity
from mistral_prune_lora.errors import CheckpointError, DataError
from mistral_prune_lora.storage.json_file import parsed
from mistral_prune_lora.storage.plain_file import check_plain
from mistral_prune_lora.storage.safetensors_file import TensorSpec, plan_file, tensor_bytes
from mistral_prune_lora.storage.transaction import atomic_file
from mistral_prune_lora.text.sources import Text

PROTOCOL = "text joined and tokenised once, non-overlapping windows, remainder dropped, seqlen-1 predictions a window"


@dataclass(frozen=True)
class WindowsIdentity:
    """What a set of windows was cut from.

    Attributes:
        dataset, split, source: as in `sources.Text`.
        text_sha256: of the text's UTF-8 bytes.
        ids_sha256: of the windows' ids as little-endian int32 in reading order; where documents have positions of their
            own, of these too (`ids_digest`).
        tokenizer: directory or Hub id that the tokenizer came from.
        tokenizer_sha256: over the tokenizer's files.
        utf8_bytes: bytes of the text that the windows cover.
        seqlen: token ids in a window.
        windows: how many there are.
        text_windows: how many the whole text would have given.
        scored_sha256: of which tokens are scored (`scored_digest`); None where all but the first of a window are.
        examples: how the documents were made of rows and put into windows; None for windows of a running text.
    """

    dataset: str
    split: str
    source: str
    text_sha256: str
    ids_sha256: str
    tokenizer: str
    tokenizer_sha256: str
    utf8_bytes: int
    seqlen: int
    windows: int
    text_windows: int
    scored_sha256: str | None = None
    examples: dict | None = None

    def content(self) -> dict:
        """All of it as JSON takes it, without what a running text has not."""
        absent = {name for name in ("scored_sha256", "examples") if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if name not in absent}


@dataclass(frozen=True)
class Windows:
    """Token ids to evaluate or train on.

    Attributes:
        ids: int32, shape (windows, seqlen).
        identity: what they are.
        positions: int32, shape (windows, seqlen): the position of each token in its document, counted anew from 0 where
            a document begins. No token attends to another document; padding is a document of its own. None: every
            window is one run from 0 on.
        scored: bool, shape (windows, seqlen): whether a token is a target of the loss; the first token of a document
            never is. None: all but the first of each window.
    """

    ids: torch.Tensor
    identity: WindowsIdentity
    positions: torch.Tensor | None = None
    scored: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Token ids in a window."""
        return self.ids.shape[1]

    @property
    def predicted_tokens(self) -> int:
        """Tokens that are predicted: the scored ones, or all but the first of each window."""
        return len(self) * (self.seqlen - 1) if self.scored is None else int(self.scored.sum())

    @property
    def scored_sha256(self) -> str | None:
        """Identifies which tokens are scored; None where all but the first of each window are."""
        return self.identity.scored_sha256

    def check_running_text(self, purpose: str) -> None:
        """Raise a DataError for windows of examples, of which a measurement would take what must not be scored.

        Args:
            purpose: what asks for every token, as the subject of a sentence.
        """
        if self.positions is not None or self.scored is not None:
            raise DataError(
                f"{purpose} takes every token of a running text, and these windows are examples of which some are not"
                " scored",
                where=self.identity.source,
                mend="Use a dataset of the shape text, whose windows run across documents",
            )

    def save(self, path: str | Path) -> None:
        """Write them to one safetensors file, whole or not at all.

        It holds the tensor "ids", "positions" and "scored" where these are there, and the identity in its metadata.
        """
        held = {name: tensor for name, tensor in self._tensors().items() if tensor is not None}
        specs = [TensorSpec(name, _KINDS[name][1], tuple(tensor.shape)) for name, tensor in held.items()]
        head, ordered = plan_file(specs, {"windows": json.dumps(self.identity.content())})
        with atomic_file(path) as fresh, open(fresh, "wb") as file:
            file.write(head)
            for spec in ordered:
                file.write(tensor_bytes(held[spec.name]))

    def _tensors(self) -> dict[str, torch.Tensor | None]:
        return {"ids": self.ids, "positions": self.positions, "scored": self.scored}

    @classmethod
    def load(cls, path: str | Path) -> Windows:
        """Read a file that `save` wrote.

        Raises:
            DataError: not such a file, its tensors are not those that its identity speaks of, or none of windows.
        """
        check_plain(path, DataError, mend=_AGAIN)
        try:
            with safe_open(path, "pt") as file:
                held = {name: file.get_tensor(name) for name in _KINDS if name == "ids" or name in file.keys()}  # noqa: SIM118
                identity = WindowsIdentity(**parsed(file.metadata()["windows"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"is not a file of windows: {error}", where=path, mend=_AGAIN) from None
        windows = cls(held["ids"], identity, held.get("positions"), held.get("scored"))
        if fault := _fault(windows):
            raise DataError(fault, where=path, mend=_AGAIN)
        return windows


_AGAIN = "Make the windows again"
_KINDS = {"ids": (torch.int32, "I32"), "positions": (torch.int32, "I32"), "scored": (torch.bool, "BOOL")}


def _fault(windows: Windows) -> str | None:
    """What is wrong with windows that were read, in words."""
    ids, positions, scored, identity = windows.ids, windows.positions, windows.scored, windows.identity
    held = {name: tensor for name, tensor in windows._tensors().items() if tensor is not None}
    # Digests are of little-endian numbers of known widths; what has another dtype has another digest.
    digests = (ids_digest(ids, positions), None if scored is None else scored_digest(scored))
    wanted = (identity.ids_sha256, identity.scored_sha256)
    if digests != wanted or any(tuple(t.shape) != (identity.windows, identity.seqlen) for t in held.values()):
        return "its ids are not those that it was written with"
    if (
        ids.shape[0] < 1
        or ids.shape[1] < 2
        or int(ids.min()) < 0
        or any(tensor.dtype is not _KINDS[name][0] for name, tensor in held.items())
    ):
        return "its ids are no windows of token ids"
    if positions is not None and not _are_positions(positions):
        return "its positions do not count documents from 0 on"
    if scored is not None and bool((scored & _first_tokens(ids, positions)).any()):
        return "the first token of a document is scored, which nothing predicts"
    if not all(_is_of(getattr(identity, field.name), str(field.type)) for field in fields(identity)):
        return "does not say what it was cut from"
    return None


def _are_positions(positions: torch.Tensor) -> bool:
    """Whether every row begins at 0, and every number is one more than the one before it, or 0."""
    follows = positions[:, 1:] == positions[:, :-1] + 1
    return bool((positions[:, 0] == 0).all()) and bool((follows | (positions[:, 1:] == 0)).all())


def _first_tokens(ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Where a document begins, bool, shape as the ids."""
    if positions is not None:
        return positions == 0
    first = torch.zeros(ids.shape, dtype=torch.bool)
    first[:, 0] = True
    return first


def _is_of(value: object, kind: str) -> bool:
    """Whether a field's value is of its type, which stands there as text, as all annotations of this module do."""
    return (value is None and kind.endswith(" | None")) or type(value).__name__ == kind.removesuffix(" | None")


def make_windows(
    text: Text, tokenizer, *, seqlen: int = 2048, max_windows: int | None = None, seed: int = 0
) -> Windows:
    """Tokenise a text once (with the special tokens that the tokenizer adds) and cut it into windows.

    Args:
        text: the text; its dataset's own limit on windows holds too.
        tokenizer: a transformers tokenizer.
        seqlen: token ids in a window.
        max_windows: at most so many; None takes all.
        seed: which windows stay where there are more: 0 keeps the first ones, as published numbers do; any other seed
            draws them at random, kept in the text's order.

    Raises:
        DataError: the text is empty or shorter than one window; seqlen or max_windows is too small.
    """
    if seqlen < 2 or (max_windows is not None and max_windows < 1):
        raise DataError(
            f"{max_windows} windows of {seqlen} tokens hold nothing to predict",
            where="seqlen, max_windows",
            mend="Ask for at least one window of at least two tokens",
        )
    if not text.text.strip():
        raise DataError("the text is empty", where=text.source, mend="Give a text with something in it")
    offsets_known = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text.text, verbose=False, return_offsets_mapping=offsets_known)
    ids = flat_ids(encoding)
    there = len(ids) // seqlen
    if there == 0:
        raise DataError(
            f"the text has {len(ids)} tokens, less than one window of {seqlen}",
            where=text.source,
            mend="Use a longer text or a smaller seqlen",
        )
    limits = [limit for limit in (max_windows, text.max_windows) if limit is not None]
    chosen = _choose(there, min([there, *limits]), seed)
    cut = ids[: there * seqlen].view(there, seqlen)[chosen].contiguous()
    if offsets_known:
        covered = _covered_bytes(text.text, encoding["offset_mapping"], seqlen, chosen)
    else:
        covered = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in cut.tolist())
    identity = WindowsIdentity(
        dataset=text.name,
        split=text.split,
        source=text.source,
        text_sha256=text.sha256,
        ids_sha256=ids_digest(cut),
        tokenizer=str(tokenizer.name_or_path),
        tokenizer_sha256=_tokenizer_digest(tokenizer),
        utf8_bytes=covered,
        seqlen=seqlen,
        windows=len(cut),
        text_windows=there,
    )
    return Windows(cut, identity)


def first_windows(windows: Windows, count: int) -> Windows:
    """The first `count` windows; their share of the text's bytes is taken in proportion."""
    return windows if count >= len(windows) else windows_between(windows, 0, count)


def windows_between(windows: Windows, first: int, last: int) -> Windows:
    """The windows first..last-1; their share of the text's bytes is taken in proportion."""
    held = (windows.ids, windows.positions, windows.scored)
    ids, positions, scored = (None if t is None else t[first:last].contiguous() for t in held)
    assert ids is not None
    identity = replace(
        windows.identity,
        ids_sha256=ids_digest(ids, positions),
        scored_sha256=None if scored is None else scored_digest(scored),
        utf8_bytes=round(windows.identity.utf8_bytes * len(ids) / len(windows)),
        windows=len(ids),
    )
    return Windows(ids, identity, positions, scored)


def flat_ids(encoding) -> torch.Tensor:
    """The token ids in whatever a tokenizer or `get_loaders` hands out, as int32, shape (tokens,).

    A BatchEncoding is a dict: iterating over it gives the names of its fields, never the ids. So the ids are asked for
    by name first.

    Args:
        encoding: a BatchEncoding or other mapping with "input_ids", an object with `.input_ids`, a tensor, or a list;
            one text, with or without a batch dimension.

    Raises:
        DataError: there are no ids, or those of more than one text.
    """
    if isinstance(encoding, Mapping) or hasattr(encoding, "input_ids"):
        try:
            encoding = encoding["input_ids"] if isinstance(encoding, Mapping) else encoding.input_ids
        except KeyError:
            raise DataError(f"the encoding has no input_ids, only {sorted(encoding)}") from None
    try:
        ids = torch.as_tensor(encoding)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"{type(encoding).__name__} holds no token ids", mend="Pass what the tokenizer returns"
        ) from None
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point():
        raise DataError(f"token ids of one text are wanted, not a {ids.dtype} tensor of shape {tuple(ids.shape)}")
    return ids.to(torch.int32)


def ids_digest(ids: torch.Tensor, positions: torch.Tensor | None = None) -> str:
    """The sha256 of token ids, and of positions after them where there are some.

    Both are taken as little-endian int32 in reading order; between them stands the word "positions".
    """
    digest = hashlib.sha256(_int32_bytes(ids))
    if positions is not None:
        digest.update(b"positions" + _int32_bytes(positions))
    return digest.hexdigest()


def scored_digest(scored: torch.Tensor) -> str:
    """The sha256 of which tokens are scored: a byte each, 1 or 0, in reading order."""
    return hashlib.sha256(scored.to(torch.uint8).numpy().tobytes()).hexdigest()


def _int32_bytes(numbers: torch.Tensor) -> bytes:
    return numbers.to(torch.int32).numpy().astype("<i4").tobytes()


def _choose(there: int, wanted: int, seed: int) -> list[int]:
    if seed == 0 or wanted == there:
        return list(range(wanted))
    return sorted(random.Random(seed).sample(range(there), wanted))


def _covered_bytes(text: str, offsets: list[tuple[int, int]], seqlen: int, chosen: list[int]) -> int:
    """UTF-8 bytes of the text that the chosen windows cover, each from where the window before it ends."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    byte_at = np.concatenate([[0], np.cumsum(widths)])
    # A special token covers no characters and says (0, 0); the furthest end so far is where the text stands.
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    total = 0
    for window in chosen:
        start = ends[window * seqlen - 1] if window else 0
        total += int(byte_at[ends[(window + 1) * seqlen - 1]] - byte_at[start])
    return total


def _tokenizer_digest(tokenizer) -> str:
    try:
        return tokenizer_identity(tokenizer.name_or_path)
    except CheckpointError:
        # Made in memory, without files: its vocabulary is what is left to tell it by.
        return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
