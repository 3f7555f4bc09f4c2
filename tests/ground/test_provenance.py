"""Versions and digests, against the standard library's own."""

import hashlib
import importlib.metadata

import pytest

from mistral_prune_lora.provenance import (
    PACKAGE,
    VERSION,
    file_sha256,
    other_files_sha256,
    record_sha256,
    versions,
)


def test_versions_are_those_that_run():
    assert versions(PACKAGE, "torch") == {PACKAGE: VERSION, "torch": importlib.metadata.version("torch")}
    assert versions("torch") == {"torch": importlib.metadata.version("torch")}
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        versions("no-such-package")


def test_files_are_told_by_their_bytes_and_path(tmp_path):
    (tmp_path / "below").mkdir()
    contents = {"a": b"one", "below/b": b"", "c": b"three"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert {name: file_sha256(tmp_path / name) for name in contents} == expected
    assert other_files_sha256(tmp_path, ("a",)) == {name: expected[name] for name in ("below/b", "c")}


def test_equal_records_have_equal_digests_whatever_the_order_of_their_keys():
    assert record_sha256({"a": 1, "b": [1, 2]}) == record_sha256({"b": [1, 2], "a": 1})
    assert len({record_sha256(record) for record in ({"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": [1]}, {})}) == 5
