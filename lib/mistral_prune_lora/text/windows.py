"""Windows: the blocks of token ids that perplexity is measured on, and what identifies them.

A text is tokenised once as a whole and cut into non-overlapping windows; the remainder is dropped. A saved file holds
the ids and, in its metadata, where they came from, so that a number can always be traced to its tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
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
        ids_sha256: of the windows' ids as little-endian int32 in reading order.
        tokenizer: directory or Hub id that the tokenizer came from.
        tokenizer_sha256: over the tokenizer's files.
        utf8_bytes: bytes of the text that the windows cover.
        seqlen: token ids in a window.
        windows: how many there are.
        text_windows: how many the whole text would have given.
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


@dataclass(frozen=True)
class Windows:
    """Token ids to evaluate on.

    Attributes:
        ids: int32, shape (windows, seqlen).
        identity: what they are.
    """

    ids: torch.Tensor
    identity: WindowsIdentity

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Token ids in a window."""
        return self.ids.shape[1]

    @property
    def predicted_tokens(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return len(self) * (self.seqlen - 1)

    def save(self, path: str | Path) -> None:
        """Write them to one safetensors file: tensor "ids", identity in the metadata; whole or not at all."""
        head, _ = plan_file(
            [TensorSpec("ids", "I32", tuple(self.ids.shape))], {"windows": json.dumps(asdict(self.identity))}
        )
        with atomic_file(path) as fresh:
            fresh.write_bytes(head + tensor_bytes(self.ids))

    @classmethod
    def load(cls, path: str | Path) -> Windows:
        """Read a file that `save` wrote.

        Raises:
            DataError: not such a file, or its ids are not those that its identity speaks of.
        """
        mend = "Make the windows again"
        check_plain(path, DataError, mend=mend)
        try:
            with safe_open(path, "pt") as file:
                ids = file.get_tensor("ids")
                identity = WindowsIdentity(**parsed(file.metadata()["windows"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"is not a file of windows: {error}", where=path, mend=mend) from None
        if ids_digest(ids) != identity.ids_sha256 or tuple(ids.shape) != (identity.windows, identity.seqlen):
            raise DataError("its ids are not those that it was written with", where=path, mend=mend)
        if ids.dtype is not torch.int32 or ids.shape[0] < 1 or ids.shape[1] < 2 or int(ids.min()) < 0:
            raise DataError("its ids are no windows of token ids", where=path, mend=mend)
        # The types of the fields stand there as text, as all annotations of this module do.
        if not all(type(getattr(identity, f.name)).__name__ == f.type for f in fields(identity)):
            raise DataError("does not say what it was cut from", where=path, mend=mend)
        return cls(ids, identity)


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
    if count >= len(windows):
        return windows
    ids = windows.ids[:count].contiguous()
    known = {f.name: getattr(windows.identity, f.name) for f in fields(WindowsIdentity)}
    known |= {
        "ids_sha256": ids_digest(ids),
        "utf8_bytes": round(windows.identity.utf8_bytes * count / len(windows)),
        "windows": count,
    }
    return Windows(ids, WindowsIdentity(**known))


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


def ids_digest(ids: torch.Tensor) -> str:
    """The sha256 of token ids as little-endian int32 in reading order."""
    return hashlib.sha256(ids.to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()


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
