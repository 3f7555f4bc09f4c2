"""Small files that ask for a lot: refused by a limit that the error names, before any of it is given."""

import gzip
import json
import os
import shutil

import pandas as pd
import pytest
from attack.byte_edits import DEPTH

from mistral_prune_lora.checkpoints.directories import bundle_layers
from mistral_prune_lora.checkpoints.families import check_family
from mistral_prune_lora.checkpoints.manifest import layout_from_manifest, read_manifest
from mistral_prune_lora.checkpoints.tokenizer import tokenizer_files
from mistral_prune_lora.errors import CheckpointError, DataError, LayoutError
from mistral_prune_lora.layout.partition import MOST_LAYERS, Layout
from mistral_prune_lora.storage.safetensors_file import read_header
from mistral_prune_lora.text import rows as text_rows
from mistral_prune_lora.text.rows import read_lines, read_rows, read_text
from mistral_prune_lora.text.saved import saved_rows
from mistral_prune_lora.text.sources import load_documents
from mistral_prune_lora.text.splits import split_files
from mistral_prune_lora.workflow.configuration import ConfigError, check_files


def test_numbers_of_layers_that_no_model_has():
    config = {"model_type": "mistral", "num_hidden_layers": 10**9}
    with pytest.raises(CheckpointError, match=f"from 1 to {MOST_LAYERS}"):
        check_family(config, "config.json")
    manifest = {"counts": {"L_full": 10**9}, "stages": {"A": {"dropped_layers": [1]}}}
    with pytest.raises(LayoutError, match=f"from 0 to {MOST_LAYERS}"):
        layout_from_manifest(manifest)
    with pytest.raises(LayoutError, match=f"{MOST_LAYERS} are the most"):
        Layout(10**9)
    many = {"removed_layers": list(range(100_000))}
    with pytest.raises(LayoutError, match=f"at most {MOST_LAYERS} layer numbers"):
        layout_from_manifest(many, 8)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_folders_and_devices(tmp_path, put):
    """None of them is waited for, and none passes for a file that is absent."""
    for name in ("layer_005.safetensors", "manifest.json", "bundle_meta.json", "tokenizer_config.json", "eval.txt"):
        put(tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    for read, kind in (
        (lambda: read_header(tmp_path / "layer_005.safetensors"), CheckpointError),
        (lambda: read_manifest(tmp_path), LayoutError),
        (lambda: bundle_layers(tmp_path), LayoutError),
        (lambda: tokenizer_files(tmp_path), CheckpointError),
        (lambda: read_text(tmp_path / "eval.txt"), DataError),
        (lambda: load_documents(text_files=[tmp_path / "eval.txt"]), DataError),
    ):
        with pytest.raises(kind, match="not a regular file"):
            read()
    for ending in (".jsonl", ".csv", ".parquet", ".json.gz"):
        (tmp_path / f"rows{ending}").symlink_to("eval.txt")
        with pytest.raises(DataError, match="not a regular file"):
            read_rows(tmp_path / f"rows{ending}", "text")


def test_a_pipe_as_data_set(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        split_files(tmp_path / "rows.jsonl", "test")


def test_holes_and_nul(tmp_path):
    for name in ("hole.txt", "hole.csv", "hole.jsonl", "hole.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(DataError, match="byte 0 is NUL"):
            read_rows(tmp_path / name, "text")
    (tmp_path / "eval.txt").write_bytes(b"a" * 3_000_000 + b"\0")
    with pytest.raises(DataError, match="byte 3000000 is NUL"):
        read_text(tmp_path / "eval.txt")


def test_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(text_rows, "MAX_TEXT_BYTES", 8 << 20)
    monkeypatch.setattr(text_rows, "_LONGEST_LINE", 4 << 20)
    monkeypatch.setattr(text_rows, "MAX_ROWS", 1000)
    bombs = {
        "endless.json.gz": (b'{"text": "' + b"a" * (20 << 20), "line 1 is longer than 4 MiB"),
        "array.json.gz": (b"[" + b" " * (20 << 20), "more than 8 MiB"),
        "lines.jsonl.gz": (b'{"text": "%s"}\n' % (b"a" * 100_000) * 100, "more than 8 MiB"),
        "empty.jsonl.gz": (b"\n" * 5000, "more than 1000 rows"),
    }
    for name, (content, what) in bombs.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=what):
            read_rows(tmp_path / name, "text")
    pd.DataFrame({"text": ["a" * 100_000] * 200}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="more than 8 MiB"):
        read_rows(tmp_path / "rows.parquet", "text")
    (tmp_path / "rows.csv").write_text("text\n" + "a\n" * 2000)
    with pytest.raises(DataError, match="more than 1000 rows"):
        read_rows(tmp_path / "rows.csv", "text")
    (tmp_path / "lines.txt").write_text("a\n" * 2000)
    with pytest.raises(DataError, match="more than 1000 rows"):
        read_lines(tmp_path / "lines.txt")
    (tmp_path / "large.txt").write_text("a" * (9 << 20))
    with pytest.raises(DataError, match="more than 8 MiB"):
        read_text(tmp_path / "large.txt")


def test_a_limit_on_rows_stops_before_the_limit_on_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(text_rows, "MAX_TEXT_BYTES", 4 << 20)
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(b'{"text": "%s"}\n' % (b"a" * 100_000) * 100))
    assert len(read_rows(tmp_path / "c4.json.gz", "text", limit=5)) == 5


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "row 2 of column text holds half a surrogate pair"),
        ("rows.jsonl", b'{"text": ' + b"[" * DEPTH + b"\n", "line 1 is nested too deeply"),
        ("rows.json.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "ends early or is damaged"),
        ("rows.json.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 60, "damaged"),
        ("rows.parquet", b"PAR1" + b"\xff" * 60 + b"PAR1", "not a parquet file"),
    ],
)
def test_malformed_rows(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what):
        read_rows(tmp_path / name, "text")


def test_a_saved_data_set(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    for change, what in (
        (lambda f: (f / "state.json").write_text("{}"), "no list of files"),
        (lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}'), "not a file beside it"),
        (lambda f: (f / "dataset_info.json").write_text("["), "cannot be read as JSON"),
        (lambda f: next(f.glob("*.arrow")).write_bytes(b"\xff" * 64), "cannot be read as a saved dataset"),
    ):
        folder = tmp_path / "spoilt"
        shutil.copytree(tmp_path / "saved", folder)
        change(folder)
        with pytest.raises(DataError, match=what):
            saved_rows(folder, "test", "text")
        shutil.rmtree(folder)


def test_a_configuration_that_contradicts_itself(tmp_path):
    (tmp_path / "config.yaml").write_text("models: {a: 1}\nexperiments:\n  x: 1\n  x: 2\n")
    with pytest.raises(ConfigError, match="line 4: the key 'x' stands twice"):
        check_files([tmp_path / "config.yaml"])


def test_names_of_tensors_have_a_length(tmp_path):
    name = f"model.layers.{'9' * 5000}.weight"
    header = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="1000 are the most"):
        read_header(tmp_path / "file")
