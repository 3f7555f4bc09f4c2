"""The reader of every small file, and of what is no file at all."""

import json
import os

import pytest

from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.storage.json_file import MAX_DEPTH, parsed, read_json, read_json_if_there
from mistral_prune_lora.storage.plain_file import open_plain


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "cannot be read as JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": 1', "cannot be read as JSON"),
        (b'{"a": "\xe4"}', "utf-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is no number"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, f"deeper than {MAX_DEPTH} levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
)
def test_what_is_refused(tmp_path, content, what):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(LayoutError, match=what) as caught:
        read_json(tmp_path / "file.json", LayoutError)
    assert len(str(caught.value)) <= 500


def test_the_limit_is_named(tmp_path):
    with open(tmp_path / "hole.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LayoutError, match="larger than 64 MiB"):
        read_json(tmp_path / "hole.json", LayoutError)


def test_whole_pairs_and_deep_but_sane_objects_are_read():
    assert parsed(r'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}
    deep = json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parsed(json.dumps(deep)) == deep


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, put):
    put(tmp_path / "file.json")
    with pytest.raises(LayoutError, match="not a regular file"):
        read_json(tmp_path / "file.json", LayoutError)
    with pytest.raises(LayoutError, match="not a regular file"), open_plain(tmp_path / "file.json", LayoutError):
        pass


def test_a_dead_link_is_not_absent(tmp_path):
    assert read_json_if_there(tmp_path / "file.json") is None
    (tmp_path / "file.json").symlink_to("nowhere")
    with pytest.raises(LayoutError, match="cannot be read"):
        read_json_if_there(tmp_path / "file.json", LayoutError)
