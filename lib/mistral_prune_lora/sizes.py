"""Sizes in bytes, read and written the way people write them."""

from __future__ import annotations

import math
import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as "6GB", "500 MB" or "8000000000" (powers of 1000).

    Raises:
        ValueError: it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 6GB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def size_text(nbytes: int) -> str:
    """A size as `parse_size` reads it, rounded up to two decimals, so that it is never too small: "1.33GB"."""
    power = next((p for p in (3, 2, 1) if nbytes >= 1000**p), 0)
    return f"{math.ceil(nbytes / 1000**power * 100) / 100:g}{('', 'K', 'M', 'G')[power]}B"
