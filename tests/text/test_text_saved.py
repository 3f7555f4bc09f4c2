import datasets
import pytest

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.sources import load_text


@pytest.fixture
def saved(tmp_path):
    splits = {
        name: datasets.Dataset.from_dict({"body": [f"{name} {i}" for i in range(3)] + [None]})
        for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_a_saved_dataset_is_read_by_split_and_column(saved):
    text = load_text(str(saved), split="train", column="body")
    assert text.text == "train 0\n\ntrain 1\n\ntrain 2"
    assert text.name == "mine" and "arrow sha256=" in text.source
    # A single split has no name of its own.
    assert load_text(str(saved / "test"), split="train", column="body").text.startswith("test 0")


def test_what_is_not_there_is_named(saved):
    with pytest.raises(DataError, match="no validation split, only test, train"):
        load_text(str(saved), split="validation", column="body")
    with pytest.raises(DataError, match="no column 'text', only body"):
        load_text(str(saved), split="test")


def test_the_folder_is_read_and_not_a_cache_of_its_name(saved):
    before = load_text(str(saved), column="body").sha256
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"body": ["new"]})}).save_to_disk(str(saved.parent / "b"))
    saved.rename(saved.parent / "old")
    (saved.parent / "b").rename(saved)
    assert load_text(str(saved), column="body").sha256 != before


def test_a_damaged_offset_or_letter_is_found_before_it_is_followed(saved):
    (arrow,) = (saved / "test").glob("*.arrow")
    whole = arrow.read_bytes()
    offsets = whole.index(b"\x06\0\0\0\x0c\0\0\0")  # of three rows of six letters, in 32 bits each
    for at, new in ((offsets + 3, b"\x7f"), (whole.index(b"test 0test 1"), b"\xff")):
        arrow.write_bytes(whole[:at] + new + whole[at + 1 :])
        with pytest.raises(DataError, match="cannot be read as a saved dataset: Column 0: In chunk 0: Invalid"):
            load_text(str(saved), column="body")
