"""A stand-in for xxhash where that is not installed: it is the one package of the library that torch's do not bring."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from types import ModuleType


def stand_in_for_xxhash() -> None:
    """Let `import xxhash` give checksums of 128 bits that hashlib makes, unless the real one is there.

    Only within this process, and only good for files that are thrown away: nobody else's records hold such checksums.
    """
    if importlib.util.find_spec("xxhash") is None:
        module = ModuleType("xxhash", stand_in_for_xxhash.__doc__)
        module.xxh3_128 = _checksum  # type: ignore[attr-defined]
        sys.modules["xxhash"] = module


def _checksum(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)
