"""Downloads from the Hub: one wording for every failure of its library, which raises a dozen kinds."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from mistral_prune_lora.errors import DataError, SourceError
from mistral_prune_lora.hub import fetch_dataset_file, fetch_files, fetched_files


def failing(error):
    def download(*args, **options):
        raise error

    return download


def of_kind(kind):
    """An error of the Hub's library without the response that its constructor asks for."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (of_kind(errors.GatedRepoError), r"the repository is gated .*owner/name.*hf auth login"),
        (of_kind(errors.RevisionNotFoundError), r"has no commit abc"),
        (of_kind(errors.RepositoryNotFoundError), r"no such repository, or it is private"),
        (errors.HFValidationError("two slashes"), r"is not a repository id: two slashes"),
        (errors.LocalEntryNotFoundError("offline"), r"the Hub cannot be reached, .*HF_HUB_OFFLINE"),
        (of_kind(errors.EntryNotFoundError), r"has no such file"),
        (OSError("no route\nto host"), r"the download failed: no route \("),
        (RuntimeError(), r"the download failed: RuntimeError"),
    ],
)
def test_failures_are_one_line(monkeypatch, error, told):
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, failing(error))
    with pytest.raises(SourceError, match=told) as caught:
        fetch_files("owner/name", ["config.json"], revision="abc")
    assert "\n" not in str(caught.value) and "the Hub model owner/name" in str(caught.value)
    with pytest.raises(DataError, match=r"file\.json: .*the Hub dataset owner/name.*Use a mirror"):
        fetch_dataset_file("owner/name", "file.json", revision="abc", kind=DataError, mend="use a mirror")
    assert fetched_files("owner/name", ["config.json"]) is None


def test_nothing_is_asked_for_but_what_is_named(monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_files("owner/name", ("a", "b*"), cache=tmp_path / "cache") == tmp_path
    assert asked == {"repo_id": "owner/name", "allow_patterns": ["a", "b*"], "cache_dir": tmp_path / "cache"}
    asked.clear()
    assert fetched_files("owner/name", ("a",)) == tmp_path
    assert asked == {"repo_id": "owner/name", "allow_patterns": ["a"], "local_files_only": True}
