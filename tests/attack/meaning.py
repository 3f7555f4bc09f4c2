"""Whether a result that differs may be right: the spoilt file is a sound one that says something else.

A text of other words is as good a text, and without a record weights carry no digest by which a flipped bit would
show. Where another reader can tell what the file says, the command must have taken it for the same.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml

from attack.deeds import STATES
from attack.edits import Spoiling
from attack.formats import Kind

# Keys of a configuration whose values nothing else in a checkpoint contradicts, and what they can be.
_NUMBERS = {
    *(
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "attention_dropout",
        "initializer_range",
        "rope_parameters",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "max_window_layers", "lora_alpha"),
    *("lora_dropout", "temperature", "top_p", "top_k"),
}
_BOOLEANS = {"use_cache", "use_rslora", "tie_word_embeddings", "do_sample", "inference_mode", "fan_in_fan_out"}
_WORDS = {"hidden_act", "layer_types", "dtype", "torch_dtype", "rope_type", "base_model_name_or_path"}
_FLOATS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}


def is_sound(kind: Kind, spoiling: Spoiling, valid: bytes, path: Path, out: Path) -> bool:
    """Whether the file at a path may be taken at its word, and the result in `out` follows from that.

    Args:
        kind: of the file.
        spoiling: what was done to it.
        valid: its former bytes.
        path: the spoilt file.
        out: where the command wrote.
    """
    if spoiling.node or any("twice, then" in edit.kind or "all keys twice" in edit.kind for edit in spoiling.edits):
        return False
    data = path.read_bytes()
    if kind in _TEXTS:
        return _same_text(_TEXTS[kind], data, out)
    if kind in (Kind.WEIGHTS, Kind.ADAPTER_WEIGHTS):
        return _same_tensors(valid, data)
    if kind in (Kind.MODEL_CONFIG, Kind.ADAPTER_CONFIG):
        return _only_free_keys(valid, data)
    if kind is Kind.TOKENIZER:
        return _is_tokenizer(path, data)
    if kind is Kind.CONFIGURATION:
        return isinstance(yaml.safe_load(data), dict)
    return kind is Kind.GGUF and _same_table(valid, data)


def numbers_of(out: Path) -> dict[str, object]:
    """The weights and numbers that a command wrote: what must be equal if a result is the same."""
    found: dict[str, object] = {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in _results(out)
    }
    if (out / "made.json").is_file():
        content = json.loads((out / "made.json").read_text())
        if isinstance(content, dict):
            content = [[r[key] for key in ("label", "stage", "ppl", "mean_nll")] for r in content["results"]]
        found["numbers"] = content
    return found


def _results(out: Path) -> list[Path]:
    """The weights that a command wrote, without what it keeps for another run."""
    found = sorted(out.rglob("*.safetensors"))
    kept = ("work", STATES[0])
    return [file for file in found if file.is_file() and file.relative_to(out).parts[0] not in kept]


def not_finite(out: Path) -> str:
    """The first result that is no number, be it a perplexity or a weight; empty if all are."""
    for name, value in numbers_of(out).items():
        if name == "numbers" and any(isinstance(n, float) and not math.isfinite(n) for row in value for n in row):
            return "a perplexity"
    for file in _results(out):
        for name, dtype, data in _tensors(file.read_bytes()):
            if dtype in _FLOATS:
                bits = np.frombuffer(data, _FLOATS[dtype])
                if (bits & _EXPONENT[dtype] == _EXPONENT[dtype]).any():
                    return f"{name} in {file.relative_to(out)}"
    return ""


def _tensors(data: bytes) -> Iterator[tuple[str, str, bytes]]:
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            yield name, entry["dtype"], data[first:last]


def _same_tensors(valid: bytes, data: bytes) -> bool:
    """Whether the safetensors library reads the file and finds the same tensors in it, be their numbers others."""
    from safetensors import SafetensorError, deserialize

    try:
        read, former = dict(deserialize(data)), dict(deserialize(valid))
    except (SafetensorError, ValueError):
        return False
    same = read.keys() == former.keys() and all(read[name]["shape"] == former[name]["shape"] for name in read)
    return same and {entry["dtype"] for entry in read.values()} <= {"F16", "BF16", "F32", "F64"}


def _same_table(valid: bytes, data: bytes) -> bool:
    """Whether the gguf library finds the same tensors, of the same shapes, in a GGUF file."""
    import gguf

    found = []
    for content in (valid, data):
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(content)
            file.flush()
            try:
                found.append({tensor.name: list(tensor.shape) for tensor in gguf.GGUFReader(file.name).tensors})
            except Exception:  # of a damaged file it raises any kind
                return False
    return found[0] == found[1]


def _only_free_keys(valid: bytes, data: bytes) -> bool:
    try:
        old, new = json.loads(valid), json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(new, dict):
        return False
    changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    return all(_fits(key, old.get(key), new.get(key)) for key in changed)


def _fits(key: str, old: object, new: object) -> bool:
    """Whether a value of another setting is of the kind that it must be; a key that is left out has its default."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(_fits(inner, old.get(inner), new.get(inner)) for inner in {*old, *new})
    if new is None:
        return key in _NUMBERS | _BOOLEANS | _WORDS
    if key in _NUMBERS:
        return isinstance(new, (int, float)) and not isinstance(new, bool) and math.isfinite(new)
    return isinstance(new, bool if key in _BOOLEANS else (str, list)) and key in _BOOLEANS | _WORDS


def _is_tokenizer(path: Path, data: bytes) -> bool:
    """Whether the library behind all tokenizers reads it."""
    from tokenizers import Tokenizer

    try:
        if path.name == "tokenizer.json":
            Tokenizer.from_str(data.decode("utf-8"))
        return isinstance(json.loads(data), dict)
    except Exception:  # it raises no other kind
        return False


def _same_text(read: Callable[[bytes], list[str]], data: bytes, out: Path) -> bool:
    """Whether another reader finds the text that the result says it was made from; or any, if it says nothing."""
    try:
        rows = read(data)
    except (ValueError, KeyError, TypeError, OSError, EOFError, csv.Error):
        return False
    if not (out / "made.json").is_file():
        return True
    taken = {result["text"]["sha256"] for result in json.loads((out / "made.json").read_text())["results"]}
    return taken == {hashlib.sha256("\n\n".join(rows).encode()).hexdigest()}


def _plain(data: bytes) -> list[str]:
    if b"\0" in data:
        raise ValueError("NUL")
    return [data.decode("utf-8").removeprefix("\ufeff")]


def _json_lines(data: bytes) -> list[str]:
    (text,) = _plain(data)
    if text.lstrip().startswith("["):
        return _texts(json.loads(text))
    return _texts([json.loads(line) for line in text.split("\n") if line.strip()])


def _texts(objects: list[dict]) -> list[str]:
    rows = [row["text"] for row in objects]
    if not all(row is None or isinstance(row, str) for row in rows):
        raise ValueError("no text")
    return [row for row in rows if row is not None]


def _csv(data: bytes) -> list[str]:
    (text,) = _plain(data)
    csv.field_size_limit(2**31 - 1)
    table = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    place = table[0].index("text")
    return [row[place] for row in table[1:]]


_TEXTS: dict[Kind, Callable[[bytes], list[str]]] = {
    Kind.TEXT: _plain,
    Kind.ROWS: _json_lines,
    Kind.ARRAY: _json_lines,
    Kind.PACKED: lambda data: _json_lines(gzip.decompress(data)),
    Kind.CSV: _csv,
}
