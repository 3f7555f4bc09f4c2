"""What files come to: mutations of a valid file that a command reads, seeded, each undone afterwards.

for mutation in mutations(path, random.Random(0)):
    with mutated(path, mutation):
        ...
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DEPTH = 100_000  # of nested lists: far beyond what Python's parser goes down to


@dataclass(frozen=True)
class Mutation:
    """One way to spoil a file.

    Attributes:
        name: says what is done, for a report.
        put: given the path, at which nothing lies any more, and the file's former bytes, puts something there.
    """

    name: str
    put: Callable[[Path, bytes], None]


@contextlib.contextmanager
def mutated(path: Path, mutation: Mutation) -> Iterator[None]:
    """The file, spoilt for the length of the block; afterwards the very same file lies there again."""
    aside = Path(tempfile.mkdtemp(dir=path.parent.parent)) / path.name
    valid = path.read_bytes()
    path.rename(aside)
    try:
        mutation.put(path, valid)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        aside.rename(path)
        aside.parent.rmdir()


def mutations(path: Path, random: random.Random) -> list[Mutation]:
    """All that are here for a file, by its name; numbers and keys are drawn by `random`."""
    found = [*nodes(), *byte_mutations(random)]
    if path.name.endswith(".json"):
        found += json_mutations(json.loads(path.read_text(encoding="utf-8")), random)
    return found


def nodes() -> list[Mutation]:
    """Things that are no regular file, or none at all. All are made without privileges."""
    return [
        Mutation("a pipe", lambda path, _: os.mkfifo(path)),
        Mutation("a directory", lambda path, _: path.mkdir()),
        Mutation("an endless device", lambda path, _: path.symlink_to("/dev/zero")),
        Mutation("a link to itself", lambda path, _: path.symlink_to(path.name)),
        Mutation("not there", lambda path, _: None),
    ]


def byte_mutations(random: random.Random) -> list[Mutation]:
    """What can be done to any file's bytes."""
    share = random.random()
    place = random.random()
    noise = random.randbytes(64)

    def cut(data: bytes) -> bytes:
        return data[: int(len(data) * share)]

    def flipped(data: bytes) -> bytes:
        at = int(len(data) * place)
        return data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :] if data else data

    return [
        _bytes("empty", lambda _: b""),
        _bytes(f"cut to {share:.2f}", cut),
        _bytes("null", lambda _: b"null"),
        _bytes("a list", lambda _: b"[]"),
        _bytes("an empty object", lambda _: b"{}"),
        _bytes("a number of 5000 digits", lambda _: b"9" * 5000),
        _bytes("an endless exponent", lambda _: b'{"num_hidden_layers": 1e999}'),
        _bytes("nested lists", lambda _: b"[" * DEPTH),
        _bytes("nested objects", lambda _: b'{"a":' * DEPTH),
        _bytes("Latin-1", lambda data: b"\xe4\xf6\xfc" + data),
        _bytes(f"bit flipped at {place:.2f}", flipped),
        _bytes("NUL bytes", lambda data: b"\0" * max(64, len(data))),
        _bytes("NUL bytes behind", lambda data: data + b"\0" * 64),
        _bytes("noise", lambda _: noise),
        Mutation("a hole of 1 TB", _hole),
    ]


def json_mutations(content: dict, random: random.Random) -> list[Mutation]:
    """What can be done to a JSON object: its keys twice or gone, its values of another kind or size.

    Every key is spoilt, with values that are drawn.
    """
    found = [_json("all keys twice", lambda: _twice(content))]
    values = {
        "null": None,
        "a list": [],
        "an object": {},
        "a string": "x",
        "a string with controls": "\x1b[2J\n" + "y" * 10_000,
        "half a surrogate pair": "\ud800",
        "negative": -1,
        "0": 0,
        "a billion": 10**9,
        "1e300": 1e300,
        "NaN": float("nan"),
        "infinity": float("inf"),
        "a fraction": 2.5,
        "true": True,
        "100,000 numbers": list(range(100_000)),
    }
    for path in _paths(content):
        name = random.choice(list(values))
        found.append(
            _json(f"{'.'.join(path)} is {name}", lambda p=path, n=name: json.dumps(_with(content, p, values[n])))
        )
        found.append(_json(f"without {'.'.join(path)}", lambda p=path: json.dumps(_with(content, p))))
    return found


def _paths(content: dict, before: tuple[str, ...] = (), depth: int = 4) -> list[tuple[str, ...]]:
    """The keys of an object and of the objects in it; of an object of many keys, such as a vocabulary, the first."""
    found = []
    for key in list(content)[:40]:
        found.append((*before, key))
        if isinstance(content[key], dict) and depth > 1:
            found += _paths(content[key], (*before, key), depth - 1)
    return found


_GONE = object()


def _with(content: dict, path: tuple[str, ...], value: object = _GONE) -> dict:
    first, *rest = path
    if rest:
        return {**content, first: _with(content[first], tuple(rest), value)}
    left = {key: old for key, old in content.items() if key != first}
    return left if value is _GONE else {**left, first: value}


def _twice(content: dict) -> str:
    text = json.dumps(content)
    return f"{text[:-1]}, {json.dumps({key: None for key in content})[1:]}"


def _json(name: str, text: Callable[[], str]) -> Mutation:
    return Mutation(name, lambda path, _: path.write_text(text(), encoding="utf-8"))


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Mutation:
    return Mutation(name, lambda path, data: path.write_bytes(change(data)) and None)


def _hole(path: Path, _: bytes) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)
