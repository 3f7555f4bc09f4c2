"""get_loaders: the guide's signature, the shapes, and the windows that GPTQ-style code would draw."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import save_tokenizer
from transformers import AutoTokenizer

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.pruning.data import get_loaders, token_ids
from mistral_prune_lora.text.sources import load_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def write_rows(path: Path, rows: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: rows}), path)


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    folder = tmp_path / "wikitext/wikitext-2-raw-v1"
    write_rows(folder / "train-00000-of-00001.parquet", ["", *(f" Training line number {i} . \n" for i in range(40))])
    write_rows(folder / "test-00000-of-00001.parquet", ["", *(f" Test line number {i} . \n" for i in range(20))])
    return tmp_path / "wikitext"


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    for file, documents in {
        "c4-train.00000-of-01024.json.gz": [f"{i} " + "word " * (i % 7) for i in range(60)],
        "c4-validation.00000-of-00008.json.gz": [f"Validation document {i}" for i in range(1200)],
    }.items():
        (tmp_path / "c4/en").mkdir(parents=True, exist_ok=True)
        with gzip.open(tmp_path / "c4/en" / file, "wt") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    return tmp_path / "c4"


def test_everything_but_the_name_goes_by_keyword(tokenizer):
    """`get_loaders(name, tokenizer)` once took the tokenizer for `nsamples` and measured zero tokens."""
    with pytest.raises(TypeError):
        get_loaders("pydoc", tokenizer)
    with pytest.raises(TypeError):
        get_loaders("pydoc", 8, 0, 16, tokenizer)


def test_guides_call(tokenizer):
    tok = tokenizer
    trainloader, testenc = get_loaders("pydoc", nsamples=256, seed=0, seqlen=2048, tokenizer=tok)
    assert len(trainloader) == 256
    for ids, targets in (trainloader[0], trainloader[-1]):
        assert ids.shape == targets.shape == (1, 2048)
        assert ids.dtype == targets.dtype == torch.int64
        assert (targets[:, :-1] == -100).all()
        assert targets[0, -1] == ids[0, -1]
    expected = tok(load_text("pydoc").text)["input_ids"]
    assert testenc.input_ids.shape == (1, len(expected))
    assert testenc.input_ids[0].tolist() == expected
    assert testenc.text == load_text("pydoc")


def test_windows_are_those_of_the_reference_loader(wikitext: Path, tokenizer):
    """GPTQ's loader: `random.seed(seed)`, then one `random.randint(0, ids - seqlen - 1)` a window."""
    trainloader, _ = get_loaders("wikitext2", nsamples=9, seed=3, seqlen=32, tokenizer=tokenizer, mirror=wikitext)
    ids = tokenizer(load_text("wikitext2", split="train", mirror=wikitext).text)["input_ids"]
    random.seed(3)
    for window, _ in trainloader:
        start = random.randint(0, len(ids) - 32 - 1)
        assert window[0].tolist() == ids[start : start + 32]


def test_seed_decides(wikitext: Path, tokenizer):
    def starts(seed):
        loader, _ = get_loaders(
            "wikitext2", nsamples=5, seed=seed, seqlen=32, tokenizer=tokenizer, mirror=wikitext, splits=["train"]
        )
        return [window[0].tolist() for window, _ in loader]

    state = random.getstate()
    assert starts(1) == starts(1) != starts(2)
    assert random.getstate() == state, "the caller's generator is left alone"


def test_one_split_does_not_need_the_other(wikitext: Path, tokenizer):
    options = {"nsamples": 2, "seqlen": 16, "tokenizer": tokenizer, "mirror": wikitext}
    (wikitext / "wikitext-2-raw-v1/test-00000-of-00001.parquet").rename(wikitext / "kept.parquet")
    trainloader, testenc = get_loaders("wikitext2", splits=["train"], **options)
    assert len(trainloader) == 2
    assert testenc is None
    with pytest.raises(DataError, match="no test split, only train"):
        get_loaders("wikitext2", **options)
    (wikitext / "wikitext-2-raw-v1/train-00000-of-00001.parquet").unlink()
    (wikitext / "kept.parquet").rename(wikitext / "wikitext-2-raw-v1/test-00000-of-00001.parquet")
    trainloader, testenc = get_loaders("wikitext2", splits=["test"], **options)
    assert trainloader is None
    assert testenc.input_ids.shape[1] > 100


def test_c4_windows_come_from_inside_one_long_document(c4: Path, tokenizer):
    trainloader, testenc = get_loaders("c4", nsamples=20, seed=0, seqlen=24, tokenizer=tokenizer, mirror=c4)
    documents = [f"{i} " + "word " * (i % 7) for i in range(60)]
    random.seed(0)
    for window, _ in trainloader:
        while True:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) > 24:
                break
        start = random.randint(0, len(ids) - 24 - 1)
        assert window[0].tolist() == ids[start : start + 24]
    assert testenc.input_ids.shape == (1, 256 * 24)
    whole = tokenizer(" ".join(f"Validation document {i}" for i in range(1100)))["input_ids"]
    assert testenc.input_ids[0].tolist() == whole[: 256 * 24]


def test_c4_without_a_long_document(c4: Path, tokenizer):
    with pytest.raises(DataError, match="none of 60 documents is longer than a window of 500 tokens"):
        get_loaders("c4", nsamples=2, seqlen=500, tokenizer=tokenizer, mirror=c4)


def test_ptb_and_users_datasets(tmp_path: Path, tokenizer):
    write_rows(tmp_path / "ptb/penn_treebank/train/0000.parquet", ["no it was n't"] * 20, column="sentence")
    write_rows(tmp_path / "ptb/penn_treebank/test/0000.parquet", ["black monday"] * 3, column="sentence")
    trainloader, testenc = get_loaders("ptb", nsamples=1, seqlen=8, tokenizer=tokenizer, mirror=tmp_path / "ptb")
    assert trainloader[0][0].shape == (1, 8)
    assert tokenizer.decode(testenc.input_ids[0]) == "black monday black monday black monday"

    write_rows(tmp_path / "mine/train.parquet", ["a document"] * 20, column="body")
    trainloader, _ = get_loaders(
        str(tmp_path / "mine"), nsamples=3, seqlen=8, tokenizer=tokenizer, column="body", splits=["train"]
    )
    assert len(trainloader) == 3


def test_too_little_to_draw_from(tmp_path: Path, tokenizer):
    (tmp_path / "short.txt").write_text("0123456789abcdef")
    options = {"tokenizer": tokenizer, "splits": ["train"], "nsamples": 1}
    # One id more than the window is the least that leaves a start to draw.
    assert get_loaders(str(tmp_path / "short.txt"), seqlen=15, **options)[0][0][0].shape == (1, 15)
    with pytest.raises(DataError, match=r"16 tokens, not more than one window of 16 .*short\.txt"):
        get_loaders(str(tmp_path / "short.txt"), seqlen=16, **options)
    for wrong in ({"nsamples": 0, "seqlen": 8}, {"nsamples": 1, "seqlen": 1}):
        with pytest.raises(DataError, match="hold nothing to predict"):
            get_loaders("pydoc", tokenizer=tokenizer, **wrong)
    for splits in ([], ["test", "validation"]):
        with pytest.raises(DataError, match="not the splits of a calibration"):
            get_loaders("pydoc", tokenizer=tokenizer, splits=splits)


def test_token_ids_are_the_tokenizers_numbers_not_its_keys(tokenizer):
    """Iterating over an encoding gives the names of its fields, which once made every count of tokens zero."""
    ids = token_ids("abc", tokenizer)
    assert ids.dtype == torch.int64
    assert ids.tolist() == tokenizer.encode("abc")
