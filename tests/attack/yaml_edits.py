"""What can be done to a YAML configuration: as to a JSON object, and what only YAML knows."""

from __future__ import annotations

from collections.abc import Callable

import yaml

from attack.json_edits import MEANINGS

SNIPPETS = {
    "an alias of nothing": "x: *nothing\n",
    "a tab": "\tx: 1\n",
    "a Python object": "x: !!python/object/apply:os.system ['true']\n",
    "a second document": "---\nx: 1\n",
    "a merge key": "<<: {models: 1}\n",
    "a top-level key twice": "models: {}\n",
    "a list": "- 1\n",
    "a key that is a list": "? [1, 2]\n: 3\n",
    "a key that is a date": "2020-01-01: 1\n",
    "an anchor that holds itself": "x: &x [*x]\n",
    "a billion laughs": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),
    "a long key": "k" * 5000 + ": 1\n",
    "a control character": "x: '\x07'\n",
    "binary": "x: !!binary aGVsbG8=\n",
}


def _meaning(do: Callable[..., object]) -> Callable[..., bytes]:
    def edit(data: bytes, *arguments: object) -> bytes:
        try:
            content = yaml.safe_load(data)
        except (ValueError, yaml.YAMLError, RecursionError):
            return data
        if not isinstance(content, dict) or not content:
            return data
        changed = do(content, *arguments)
        # JSON is YAML, and the text of a key that stands twice is JSON already.
        text = changed if isinstance(changed, str) else yaml.safe_dump(changed)
        return text.encode("utf-8", "surrogatepass")

    return edit


YAML_EDITS: dict[str, Callable[..., bytes]] = {
    **{f"configuration: {name}": _meaning(do) for name, do in MEANINGS.items()},
    "YAML behind": lambda data, name: data + SNIPPETS[name].encode(),
    "YAML before": lambda data, name: SNIPPETS[name].encode() + data,
}
