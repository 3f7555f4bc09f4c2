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
