"""What can be done to a JSON object: its keys twice, gone or misspelt, its values of another kind or size."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

# Values that no author of a file had in mind of a file had in mind, by their names in a report.
VALUES = {
    "null": None,
    "a list": [],
    "an object": {},
    "a string": "x",
    "an empty string": "",
    "a path": "../../../../etc/passwd",
    "a string with controls": "\x1b[2J\n" + "y" * 10_000,
    "half a surrogate pair": "\ud800",
    "minus one": -1,
    "zero": 0,
    "one": 1,
    "a billion": 10**9,
    "beyond 64 bits": 10**30,
    "1e300": 1e300,
    "1e-300": 1e-300,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a fraction": 2.5,
    "true": True,
    "false": False,
    "a list of null": [None],
    "nested lists": [[[[[[[[]]]]]]]],
    "100,000 numbers": list(range(100_000)),
}

_SHOWN = 25  # of a vocabulary's hundreds of keys, so that the others are met too
_STAND_IN = "a key that stands twice"

Place = tuple[dict | list, str | int]  # a container and what it holds something under


def change(data: bytes, do: Callable[..., object], *arguments: object) -> bytes:
    """The bytes of a JSON object after a change of its meaning; what is no JSON object is left alone."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(content, dict) or not content:
        return data
    return as_text(do(content, *arguments)).encode("utf-8", "surrogatepass")


def as_text(content: object) -> str:
    """JSON, in which a key that `twice` has doubled stands twice."""
    return content if isinstance(content, str) else json.dumps(content)


def places(content: dict | list) -> list[Place]:
    """Everything in an object and in the objects and lists in it."""
    found: list[Place] = []
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    for key in keys if len(keys) <= _SHOWN else [*keys[: _SHOWN - 5], *keys[-5:]]:
        found.append((content, key))
        if isinstance(content[key], (dict, list)):
            found += places(content[key])
    return found


def chosen(content: dict, share: float, fits: Callable[[Place], bool] = lambda place: True) -> Place:
    """One place that fits, by its share of all of them; the first key if none fits."""
    fitting = [place for place in places(content) if fits(place)] or [(content, next(iter(content)))]
    return fitting[min(int(share * len(fitting)), len(fitting) - 1)]


def _in_object(place: Place) -> bool:
    return isinstance(place[0], dict)


def _number(place: Place) -> bool:
    return isinstance(place[0][place[1]], (int, float)) and not isinstance(place[0][place[1]], bool)


def _list(place: Place) -> bool:
    return isinstance(place[0][place[1]], list)


def is_(content: dict, share: float, name: str) -> object:
    """A value is replaced."""
    holder, key = chosen(content, share)
    holder[key] = copy.deepcopy(VALUES[name])
    return content


def without(content: dict, share: float) -> object:
    """A key is struck out."""
    holder, key = chosen(content, share)
    del holder[key]
    return content


def misspelt(content: dict, share: float) -> object:
    """A key has another name."""
    holder, key = chosen(content, share, _in_object)
    holder[f"{key}s"] = holder.pop(key)
    return content


def twice(content: dict, share: float, name: str) -> object:
    """A key stands twice, the second time with another value."""
    holder, key = chosen(content, share, _in_object)
    holder[_STAND_IN] = copy.deepcopy(VALUES[name])
    return json.dumps(content).replace(json.dumps(_STAND_IN), json.dumps(key))


def all_twice(content: dict) -> object:
    """Every key of the outermost object stands twice, the second time with null."""
    return f"{json.dumps(content)[:-1]}, {json.dumps(dict.fromkeys(content))[1:]}"


def exchanged(content: dict, first: float, second: float) -> object:
    """Two keys have each other's values."""
    a, b = chosen(content, first), chosen(content, second)
    left, right = copy.deepcopy(a[0][a[1]]), copy.deepcopy(b[0][b[1]])
    a[0][a[1]] = right
    b[0][b[1]] = left
    return content


def shifted(content: dict, share: float, by: int) -> object:
    """A number is a little larger or smaller."""
    holder, key = chosen(content, share, _number)
    if _number((holder, key)):
        holder[key] += by
    return content


def quoted(content: dict, share: float) -> object:
    """A value stands as a string."""
    holder, key = chosen(content, share)
    holder[key] = json.dumps(holder[key])
    return content


def wrapped(content: dict, share: float, kind: str) -> object:
    """A value lies one list, one object or 300 lists deeper."""
    holder, key = chosen(content, share)
    value = holder[key]
    if kind == "object":
        value = {"value": value}
    for _ in range({"object": 0, "list": 1}.get(kind, 300)):
        value = [value]
    holder[key] = value
    return content


def relisted(content: dict, share: float, how: str) -> object:
    """A list is reversed, has one more or one less, or its first twice."""
    holder, key = chosen(content, share, _list)
    values = holder[key]
    if isinstance(values, list):
        changes = {"reversed": values[::-1], "longer": [*values, 7], "shorter": values[:-1], "twice": values * 2}
        holder[key] = changes[how]
    return content


def foreign(content: dict, name: str) -> object:
    """A key that nobody knows."""
    content["x" * 40] = copy.deepcopy(VALUES[name])
    return content


MEANINGS: dict[str, Callable[..., object]] = {
    "value is": is_,
    "key struck out": without,
    "key misspelt": misspelt,
    "key twice, then": twice,
    "all keys twice": all_twice,
    "values exchanged": exchanged,
    "number shifted": shifted,
    "value quoted": quoted,
    "value wrapped": wrapped,
    "list changed": relisted,
    "unknown key": foreign,
}
JSON_EDITS: dict[str, Callable[..., bytes]] = {
    name: lambda data, *arguments, do=do: change(data, do, *arguments) for name, do in MEANINGS.items()
}
