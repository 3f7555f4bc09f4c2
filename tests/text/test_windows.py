"""Windows of token ids: how they are cut, what identifies them, and the two ways to have measured no token at all."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from cut_model import random_windows, text_of
from tiny import save_tokenizer
from transformers import AutoTokenizer, BatchEncoding

from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.pruning.data import get_loaders
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import Windows, first_windows, flat_ids, ids_digest, make_windows


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def test_windows_do_not_overlap_and_the_remainder_is_dropped(tokenizer):
    content = "abcdefghij" * 5 + "xyz"
    windows = make_windows(text_of(content), tokenizer, seqlen=8)
    ids = tokenizer(content)["input_ids"]
    assert windows.ids.dtype == torch.int32 and windows.ids.tolist() == [ids[i : i + 8] for i in range(0, 48, 8)]
    assert (len(windows), windows.seqlen, windows.predicted_tokens) == (6, 8, 6 * 7)
    assert (windows.identity.windows, windows.identity.text_windows, windows.identity.utf8_bytes) == (6, 6, 48)
    digest = hashlib.sha256(windows.ids.numpy().astype("<i4").tobytes()).hexdigest()
    assert windows.identity.ids_sha256 == digest


def test_bytes_are_counted_where_a_window_ends_within_a_character(tokenizer):
    content = "é漢😀a" * 20  # 2 + 3 + 4 + 1 bytes, each a token
    assert len(tokenizer(content)["input_ids"]) == 200
    for seqlen in (5, 7, 10, 13):
        windows = make_windows(text_of(content), tokenizer, seqlen=seqlen)
        covered = len(windows) * seqlen
        # A character that a window cuts counts with the window it began in.
        assert covered <= windows.identity.utf8_bytes <= covered + 3


def test_a_limit_keeps_the_first_windows_and_a_seed_draws_others(tokenizer):
    text = text_of("".join(map(str, range(400))))
    everything = make_windows(text, tokenizer, seqlen=10)
    first = make_windows(text, tokenizer, seqlen=10, max_windows=7)
    assert torch.equal(first.ids, everything.ids[:7]) and first.identity.text_windows == len(everything)
    drawn = [make_windows(text, tokenizer, seqlen=10, max_windows=7, seed=seed).ids.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    places = [everything.ids.tolist().index(row) for row in drawn[0]]
    assert places == sorted(set(places)), "in the order of the text, none twice"
    assert torch.equal(make_windows(text, tokenizer, seqlen=10, seed=5).ids, everything.ids)


def test_the_limit_of_a_dataset_holds(tokenizer):
    text = replace(text_of("abc" * 100), max_windows=4)
    assert len(make_windows(text, tokenizer, seqlen=10)) == 4
    assert len(make_windows(text, tokenizer, seqlen=10, max_windows=3)) == 3


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("abc", {"seqlen": 4}, "has 3 tokens, less than one window of 4"),
        (" \n", {"seqlen": 2}, "the text is empty"),
        ("abc", {"seqlen": 1}, "nothing to predict"),
        ("abc", {"seqlen": 2, "max_windows": 0}, "nothing to predict"),
    ],
)
def test_what_holds_no_window_is_refused(tokenizer, content, settings, message):
    with pytest.raises(DataError, match=message):
        make_windows(text_of(content), tokenizer, **settings)


def test_saved_windows_come_back_and_damage_is_noticed(tmp_path, tokenizer):
    windows = make_windows(text_of("some text " * 9), tokenizer, seqlen=8)
    file = tmp_path / "windows.safetensors"
    windows.save(file)
    again = Windows.load(file)
    assert torch.equal(again.ids, windows.ids) and again.identity == windows.identity
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="not those that it was written with"):
        Windows.load(file)
    for broken in (content[:-1], b"", b"no safetensors"):
        file.write_bytes(broken)
        with pytest.raises(DataError, match="is not a file of windows"):
            Windows.load(file)


@pytest.mark.parametrize(
    ("ids", "changes", "told"),
    [
        ([[3, -1, 5]], {}, "no windows of token ids"),
        ([[3], [4]], {}, "no windows of token ids"),
        ([[3, 4, 5]], {"utf8_bytes": "9"}, "does not say what it was cut from"),
        ([[3, 4, 5]], {"tokenizer": None}, "does not say what it was cut from"),
    ],
)
def test_windows_that_cannot_be_are_refused(tmp_path, ids, changes, told):
    """An id of -1 would be taken for the vocabulary's last one."""
    ids = torch.tensor(ids, dtype=torch.int32)
    identity = replace(random_windows(*ids.shape).identity, ids_sha256=ids_digest(ids), **changes)
    Windows(ids, identity).save(tmp_path / "windows.safetensors")
    with pytest.raises(DataError, match=told):
        Windows.load(tmp_path / "windows.safetensors")


def test_first_windows_are_those_of_a_shorter_cut(tokenizer):
    text = text_of("abcdefghij" * 12)
    cut = first_windows(make_windows(text, tokenizer, seqlen=10), 5)
    assert torch.equal(cut.ids, make_windows(text, tokenizer, seqlen=10, max_windows=5).ids)
    assert cut.identity == make_windows(text, tokenizer, seqlen=10, max_windows=5).identity


# A text evaluated to "Tokens = 0" for two reasons; each has its test.


def test_a_positional_tokenizer_is_a_type_error(tmp_path, tokenizer):
    """`get_loaders(name, tok)` once took the tokenizer for the number of samples."""
    (tmp_path / "mine.txt").write_text("some text " * 30)
    with pytest.raises(TypeError, match="positional"):
        get_loaders(str(tmp_path / "mine.txt"), tokenizer, seqlen=8, nsamples=2)
    _, encoding = get_loaders(str(tmp_path / "mine.txt"), nsamples=2, seed=0, seqlen=8, tokenizer=tokenizer)
    assert flat_ids(encoding).tolist() == tokenizer("some text " * 30)["input_ids"]


def test_ids_are_taken_from_an_encoding_by_name(tokenizer):
    """Iterating over a BatchEncoding gives "input_ids" and "attention_mask", which hold no token."""
    encoding = tokenizer("some text", return_tensors="pt")
    assert isinstance(encoding, BatchEncoding) and all(isinstance(item, str) for item in iter(encoding))
    ids = tokenizer("some text")["input_ids"]
    wrapper = type("TokenizerWrapper", (), {"input_ids": encoding.input_ids})()
    for form in (encoding, tokenizer("some text"), dict(encoding), wrapper, encoding.input_ids, ids, [ids]):
        found = flat_ids(form)
        assert found.dtype == torch.int32 and found.tolist() == ids


@pytest.mark.parametrize(
    "form", [{"attention_mask": [1]}, ["input_ids"], [[1, 2], [3, 4]], torch.ones(3), [[1], [2, 3]]]
)
def test_what_holds_no_ids_of_one_text_is_refused(form):
    with pytest.raises(DataError):
        flat_ids(form)


def test_ids_digest_is_of_little_endian_int32():
    assert (
        ids_digest(torch.tensor([[1, 2], [3, 256]]))
        == hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 1, 0, 0])).hexdigest()
    )
    assert random_windows(2, 4).identity.ids_sha256 == ids_digest(random_windows(2, 4).ids)


@pytest.fixture(scope="session")
def mistral_tokenizer(request, tmp_path_factory):
    """Mistral-7B-v0.1's tokenizer, out of a package on PyPI; kept in pytest's cache."""
    cache = request.config.cache.mkdir("mistral-common")
    if not list(cache.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        try:
            done = subprocess.run(
                [*pip, "--dest", str(cache), "mistral-common==1.13.1"], capture_output=True, text=True, timeout=60
            )
        except subprocess.TimeoutExpired:
            pytest.skip("the package index does not answer")
        if done.returncode:
            pytest.skip(f"mistral-common cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    folder = tmp_path_factory.mktemp("mistral")
    with zipfile.ZipFile(next(cache.glob("*.whl"))) as wheel:
        (folder / "tokenizer.model").write_bytes(wheel.read("mistral_common/data/tokenizer.model.v1"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_wikitext2_with_mistrals_tokenizer_has_333661_predicted_tokens(mistral_tokenizer):
    file = os.environ.get("MPL_WIKITEXT2")
    if not file:
        pytest.skip("MPL_WIKITEXT2 does not name WikiText-2's test-00000-of-00001.parquet")
    text = load_text("wikitext2", mirror=file)
    tokenizer = load_tokenizer(mistral_tokenizer)
    assert len(flat_ids(AutoTokenizer.from_pretrained(mistral_tokenizer)(text.text))) == 334_661
    windows = make_windows(text, tokenizer, seqlen=2048)
    assert (len(windows), windows.predicted_tokens) == (163, 333_661)
    assert windows.ids[0, 0] == 1, "one <s> for the whole text"
    assert (windows.ids == 1).sum() == 1
