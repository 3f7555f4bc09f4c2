"""Texts from mirrors in the real layout of their repositories, from users' files, and the built-in corpus."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.rows import read_lines
from mistral_prune_lora.text.sources import SPLITS, load_text
from mistral_prune_lora.text.splits import split_named

# As the published parquet files have them: a line with its line end, or nothing for an empty line.
WIKI_ROWS = ["", " = A Heading = \n", "", " First paragraph . \n", " Second , with café . \n", ""]
PTB_ROWS = ["no it was n't black monday", "but while the <unk> did n't fall apart"]


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def write_parquet(path: Path, column: str, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"other": list(range(len(rows))), column: rows}), path)
    return path


def write_c4(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://x"}) + "\n")
    return path


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    root = tmp_path / "wikitext"
    write_parquet(root / "wikitext-2-raw-v1/test-00000-of-00001.parquet", "text", WIKI_ROWS)
    write_parquet(root / "wikitext-2-raw-v1/train-00000-of-00001.parquet", "text", ["training \n"])
    # The repository's other configurations must not be picked up.
    write_parquet(root / "wikitext-103-raw-v1/test-00000-of-00001.parquet", "text", ["wrong"])
    return root


@pytest.mark.parametrize("below", ["", "wikitext-2-raw-v1", "wikitext-2-raw-v1/test-00000-of-00001.parquet"])
def test_wikitext2_mirror_at_any_depth(wikitext: Path, below: str):
    text = load_text("wikitext2", mirror=wikitext / below)
    assert text.text == "\n\n".join(WIKI_ROWS)
    assert (text.name, text.split, text.max_windows) == ("wikitext2", "test", None)
    assert text.sha256 == sha256(text.text)
    file = wikitext / "wikitext-2-raw-v1/test-00000-of-00001.parquet"
    assert f"{file.name} sha256={sha256(file.read_bytes())}" in text.source


def test_wikitext2_splits_are_different_files(wikitext: Path):
    assert load_text("wikitext2", split="train", mirror=wikitext).text == "training \n"


def test_wikitext2_as_plain_text_gives_the_same_text(wikitext: Path, tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "wiki.test.raw").write_text("".join(row or " \n" for row in WIKI_ROWS), encoding="utf-8")
    expected = load_text("wikitext2", mirror=wikitext).sha256
    assert load_text("wikitext2", mirror=raw).sha256 == expected
    assert load_text("wikitext2", mirror=raw / "wiki.test.raw").sha256 == expected


def test_missing_split_names_those_there_are(wikitext: Path):
    with pytest.raises(DataError, match="no validation split, only test, train"):
        load_text("wikitext2", split="validation", mirror=wikitext)
    with pytest.raises(DataError, match="no train split, only test"):
        load_text("wikitext2", split="train", mirror=wikitext / "wikitext-2-raw-v1/test-00000-of-00001.parquet")


def test_a_folder_that_is_no_mirror(tmp_path: Path):
    with pytest.raises(DataError, match=r"wikitext-2-raw-v1/test-00000-of-00001\.parquet"):
        load_text("wikitext2", mirror=tmp_path)
    with pytest.raises(DataError, match="no such mirror"):
        load_text("wikitext2", mirror=tmp_path / "absent")


@pytest.mark.parametrize("below", ["", "en", "en/c4-validation.00000-of-00008.json.gz"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_c4_is_the_first_1100_documents(tmp_path: Path, below: str, split: str):
    documents = [f"Document {i}\nsecond line" for i in range(1200)]
    write_c4(tmp_path / "en/c4-validation.00000-of-00008.json.gz", documents)
    write_c4(tmp_path / "en/c4-validation.00001-of-00008.json.gz", ["wrong file"])
    text = load_text("c4", split=split, mirror=tmp_path / below)
    assert text.text == " ".join(documents[:1100])
    assert text.max_windows == 256


def test_c4_reads_no_further_than_it_must(tmp_path: Path):
    path = write_c4(tmp_path / "c4-validation.00000-of-00008.json.gz", ["a document"] * 1100)
    with gzip.open(path, "ab") as file:
        file.write(b"not json\n")
    assert load_text("c4", mirror=path).text == " ".join(["a document"] * 1100)


def test_c4_train_is_another_file(tmp_path: Path):
    write_c4(tmp_path / "en/c4-train.00000-of-01024.json.gz", ["for training"])
    assert load_text("c4", split="train", mirror=tmp_path).text == "for training"
    with pytest.raises(DataError, match="no test split, only train"):
        load_text("c4", mirror=tmp_path)


@pytest.mark.parametrize("below", ["", "penn_treebank", "penn_treebank/test/0000.parquet"])
def test_ptb_mirror_of_the_parquet_conversion(tmp_path: Path, below: str):
    write_parquet(tmp_path / "penn_treebank/test/0000.parquet", "sentence", PTB_ROWS)
    assert load_text("ptb", mirror=tmp_path / below).text == " ".join(PTB_ROWS)
    with pytest.raises(DataError, match="no train split, only test"):
        load_text("ptb", split="train", mirror=tmp_path / below)


def test_ptb_as_first_published(tmp_path: Path):
    (tmp_path / "ptb.test.txt").write_text("".join(f" {row} \n" for row in PTB_ROWS))
    assert load_text("ptb", mirror=tmp_path).text == " ".join(PTB_ROWS)


@pytest.mark.parametrize(
    ("dataset", "split", "repo_id", "file"),
    [
        ("wikitext2", "test", "Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        ("c4", "test", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
        ("c4", "train", "allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
        ("ptb", "validation", "ptb-text-only/ptb_text_only", "penn_treebank/validation/0000.parquet"),
    ],
)
def test_hub_file_by_explicit_path(tmp_path: Path, monkeypatch, dataset: str, split: str, repo_id: str, file: str):
    if file.endswith(".gz"):
        write_c4(tmp_path / file, ["from the Hub"])
    else:
        write_parquet(tmp_path / file, "sentence" if dataset == "ptb" else "text", ["from the Hub"])
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    text = load_text(dataset, split=split)
    assert text.text == "from the Hub"
    ((got_repo, got_file, options),) = asked
    assert (got_repo, got_file, options["repo_type"]) == (repo_id, file, "dataset")
    # A commit, or the one branch that holds a script repository's parquet files: never the default branch.
    assert options["revision"] == "refs/convert/parquet" or len(options["revision"]) == 40
    assert f"{repo_id}@{options['revision']}" in text.source


def test_no_network_says_how_to_use_a_mirror(monkeypatch):
    def download(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"cannot be reached, .*Give a local copy .* as mirror of c4, or .* pydoc\.$"):
        load_text("c4")


def test_real_wikitext2():
    """The joined test split, as every paper since GPTQ has measured it."""
    parquet = os.environ.get("MPL_WIKITEXT2")
    if not parquet:
        pytest.skip("MPL_WIKITEXT2 does not name WikiText-2's test-00000-of-00001.parquet")
    text = load_text("wikitext2", mirror=parquet)
    assert len(text.text) == 1_294_336
    assert text.sha256 == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


def test_pydoc_needs_nothing_and_its_splits_share_no_paragraph():
    texts = {split: load_text("pydoc", split=split) for split in SPLITS}
    paragraphs = {split: text.text.split("\n\n") for split, text in texts.items()}
    for split, rows in paragraphs.items():
        assert len(rows) == len(set(rows)), split
        assert all(len(row.split()) > 2 and ">>>" not in row for row in rows), split
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(paragraphs[one]) & set(paragraphs[other])
    # Long enough to be of use: 10,000 characters are about 2,000 tokens.
    assert len(texts["train"].text) > len(texts["test"].text) > 10_000
    assert texts["test"] == load_text("pydoc"), "the same text every time"
    assert "Python 3." in texts["test"].source


def test_text_files_are_joined_in_order_as_they_are(tmp_path: Path):
    (tmp_path / "b.txt").write_bytes("premier café\r\nline\n".encode())
    (tmp_path / "a.md").write_bytes("\ufeffsecond".encode())
    text = load_text("wikitext2", text_files=[tmp_path / "b.txt", tmp_path / "a.md"])
    assert text.text == "premier café\r\nline\n\n\nsecond"
    assert (text.name, text.max_windows) == ("b+a", None)
    assert f"b.txt sha256={sha256((tmp_path / 'b.txt').read_bytes())}, a.md sha256=" in text.source
    assert load_text(text_files=[tmp_path / "b.txt"]).text == "premier café\r\nline\n"


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "json", "json.gz", "csv"])
def test_user_dataset_by_path_and_column(tmp_path: Path, suffix: str):
    rows = ['first, with "quotes"\nand a line', "café", ""]
    path = tmp_path / f"mine.v2.{suffix}"
    objects = [{"id": i, "body": row} for i, row in enumerate(rows)]
    if suffix == "parquet":
        write_parquet(path, "body", rows)
    elif suffix.startswith("jsonl"):
        data = "\n".join(json.dumps(o, ensure_ascii=False) for o in objects).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    elif suffix.startswith("json"):
        data = json.dumps(objects, indent=1).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    else:
        quoted = ['"first, with ""quotes""\nand a line"', "café", '""']
        path.write_text("\n".join(["id,body", *(f"{i},{row}" for i, row in enumerate(quoted))]), encoding="utf-8")
    text = load_text(str(path), column="body")
    assert text.text == "\n\n".join(rows)
    assert text.name == "mine"
    assert f"{path.name} sha256={sha256(path.read_bytes())}" == text.source
    with pytest.raises(DataError, match=r"no column 'text', only '(id|other)', 'body'"):
        load_text(str(path))


def test_user_txt_has_no_columns(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("one\n\ntwo\n")
    assert load_text(str(tmp_path / "mine.txt")).text == "one\n\ntwo\n"


def test_csv_field_longer_than_the_csv_module_allows(tmp_path: Path):
    (tmp_path / "long.csv").write_text(f"text\n{'word ' * 40_000}\n")
    assert load_text(str(tmp_path / "long.csv")).text == "word " * 40_000


def test_rows_without_a_value_are_left_out_and_numbers_refused(tmp_path: Path):
    write_parquet(tmp_path / "nulls.parquet", "text", ["one", None, "two"])
    assert load_text(str(tmp_path / "nulls.parquet")).text == "one\n\ntwo"
    with pytest.raises(DataError, match="column other holds int, not text"):
        load_text(str(tmp_path / "nulls.parquet"), column="other")


def test_user_folder_of_one_split_or_of_several(tmp_path: Path):
    write_parquet(tmp_path / "one/part-1.parquet", "text", ["b"])
    write_parquet(tmp_path / "one/part-0.parquet", "text", ["a"])
    assert load_text(str(tmp_path / "one"), split="train").text == "a\n\nb"
    write_parquet(tmp_path / "several/test-00000.parquet", "text", ["t"])
    write_parquet(tmp_path / "several/train-00000.parquet", "text", ["r"])
    assert load_text(str(tmp_path / "several")).text == "t"
    with pytest.raises(DataError, match="no validation split, only test, train"):
        load_text(str(tmp_path / "several"), split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file to read"):
        load_text(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("c4-validation.00000-of-00008.json.gz", "validation"),
        ("wiki.valid.raw", "validation"),
        ("my_test.csv", "test"),
        ("latest.csv", None),
        ("contest-trained.txt", None),
        ("train-test.txt", None),
    ],
)
def test_split_named_by_whole_words(name: str, split: str | None):
    assert split_named(name) == split


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl", "bad.jsonl.gz", "bad.csv"])
def test_not_utf8_names_the_byte(tmp_path: Path, name: str):
    good = {"t": "good", "j": '{"text": "good"}', "c": "text\ngood"}[name.split(".")[1][0]].encode() + b"\n"
    bad = {"t": b"caf\xe9\n", "j": b'{"text": "caf\xe9"}\n', "c": b"caf\xe9\n"}[name.split(".")[1][0]]
    data = good + bad
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=f"not UTF-8: byte {data.index(0xE9)} is 0xe9 .*{name}"):
        load_text(str(tmp_path / name))
    if name == "bad.txt":
        with pytest.raises(DataError, match=f"not UTF-8: byte {data.index(0xE9)} is 0xe9 .*{name}"):
            load_text(text_files=[tmp_path / name])


def test_parquet_that_is_not_utf8(tmp_path: Path):
    column = pa.array([b"ok", b"caf\xe9"], type=pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="column text is not UTF-8"):
        load_text(str(tmp_path / "bad.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.parquet", b"PAR1 not really", "not a parquet file"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("bad.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is not a JSON object"),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "ends early"),
        ("bad.jsonl.gz", b"plain", "cannot be read"),
        ("bad.csv", b"id,text\n1,a\n2\n", "line 3 has no field for column text"),
        ("bad.doc", b"x", "of no format that is read here"),
        ("empty.txt", b"", "the text is empty"),
        ("blank.txt", b" \n\n", "the text is empty"),
        ("empty.jsonl", b"", "the text is empty"),
        ("empty.csv", b"", "no column 'text', only none at all"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_text(str(tmp_path / name))


def test_unknown_names_are_told_what_there_is(tmp_path: Path):
    with pytest.raises(DataError, match=r"unknown dataset 'wikitext3'.* wikitext2, c4, ptb, pydoc, or the path"):
        load_text("wikitext3")
    with pytest.raises(DataError, match=r"no split 'dev'.* train, validation, test"):
        load_text("pydoc", split="dev")
    with pytest.raises(DataError, match="neither a dataset nor a text file"):
        load_text()
    with pytest.raises(DataError, match="a mirror is a local copy of a benchmark"):
        load_text("pydoc", mirror=tmp_path)
    with pytest.raises(DataError, match=r"cannot be read: No such file .*absent\.txt"):
        load_text(text_files=[tmp_path / "absent.txt"])


def test_lines_end_at_line_feeds_only(tmp_path: Path):
    (tmp_path / "x.txt").write_bytes("a\u2028b\x85c\rd\ne".encode())
    assert read_lines(tmp_path / "x.txt") == ["a\u2028b\x85c\rd\n", "e"]
