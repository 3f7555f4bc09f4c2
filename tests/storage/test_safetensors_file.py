"""The safetensors reader never believes a header, and the writer writes what the library would."""

from __future__ import annotations

import json
import string

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.storage.dtypes import DTYPE_NAMES, DTYPES
from mistral_prune_lora.storage.safetensors_file import (
    TensorSpec,
    plan_file,
    read_header,
    write_file,
)

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["model.layers.2.w", "model.layers.10.w", "model.layers.10.b", '"quoted"', "a\\b", "Ω", "\x7f", "\n", "\u2028"]
)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensor_sets = st.dictionaries(
    names.filter(lambda n: n != "__metadata__"), st.tuples(st.sampled_from([*DTYPES]), shapes)
)


def tensors_of(described: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 2, shape, generator=generator).to(DTYPES[dtype])
        for name, (dtype, shape) in described.items()
    }


@SETTINGS
@given(tensor_sets)
def test_writes_the_bytes_that_the_library_writes(tmp_path, described):
    tensors = tensors_of(described)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in described.items()]
    write_file(tmp_path / "ours", specs, tensors.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@SETTINGS
@given(tensor_sets)
def test_reads_back_what_was_written(tmp_path, described):
    tensors = tensors_of(described)
    save_file(tensors, tmp_path / "file")
    entries = read_header(tmp_path / "file")
    assert entries.keys() == tensors.keys()
    assert [e.start for e in entries.values()] == sorted(e.start for e in entries.values())
    for name, entry in entries.items():
        assert (entry.dtype, entry.shape) == described[name]
        assert torch.equal(entry.read().view(torch.uint8) if entry.shape else entry.read(), plain(tensors[name]))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.shape else tensor


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
@SETTINGS
def test_reads_a_slice_of_rows(tmp_path, rows, first, last):
    whole = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
    save_file({"w": whole}, tmp_path / "file")
    assert torch.equal(read_header(tmp_path / "file")["w"].read(slice(first, last)), whole[first:last])


def agrees_with_the_library(path) -> None:
    """Ours either raises a CheckpointError or sees what the library sees; the library may be the more lenient one."""
    try:
        ours = {name: (e.dtype, list(e.shape)) for name, e in read_header(path).items()}
    except CheckpointError:
        return
    with safe_open(path, "pt") as file:
        assert ours == {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118


@SETTINGS
@given(st.binary(max_size=64), st.integers(0, 40))
@example(b"{}", 2)
def test_random_bytes_are_refused_or_read_rightly(tmp_path, content, length):
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + content)
    agrees_with_the_library(tmp_path / "file")


VALID = save(
    {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.zeros(2, 2), "none": torch.zeros(0)},
    metadata={"format": "pt"},
)


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_refused_or_read_rightly(tmp_path, flips):
    content = bytearray(VALID)
    for place, value in flips:
        content[place] = value
    (tmp_path / "file").write_bytes(content)
    agrees_with_the_library(tmp_path / "file")


@SETTINGS
@given(st.integers(0, len(VALID) - 1), st.binary(max_size=3))
def test_a_truncated_or_padded_file_is_refused(tmp_path, kept, more):
    for content in (VALID[:kept], VALID + b"x" + more):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "file")


scraps = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.text(string.printable, max_size=4)
    | st.just(2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
claims = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "f32", ""]) | scraps,
        "shape": st.lists(st.integers(0, 3) | st.sampled_from([-1, True, 1.0, 2**63, 2**64]), max_size=3) | scraps,
        "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2) | scraps,
        "more": scraps,
    },
)
headers = st.dictionaries(st.sampled_from(["a", "b", "\ud800", "__metadata__"]), claims | scraps, max_size=3)


@SETTINGS
@given(headers, st.integers(0, 12), st.sampled_from([b"", b" ", b"\n", b"x", b"\x00"]), st.sampled_from([b"", b" "]))
@example({"a": {"dtype": "F32", "shape": [2**63, 4, 0], "data_offsets": [0, 0]}}, 0, b"", b"")
@example({"__metadata__": {"a": 1}}, 0, b"", b"")
@example({}, 0, b"", b" ")
@example({"a": {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 0]}}, 0, b"", b"")
def test_forged_headers_are_refused_or_read_rightly(tmp_path, header, nbytes, behind, before):
    raw = before + json.dumps(header).encode() + behind
    (tmp_path / "file").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(nbytes))
    agrees_with_the_library(tmp_path / "file")


@SETTINGS
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["U8", "F16"]), st.integers(0, 3)), max_size=4),
    st.data(),
)
def test_tensors_in_any_order_are_read_and_gaps_refused(tmp_path, described, data):
    header, offset = {}, 0
    for name, dtype, count in described:
        assume(name not in header)
        gap = data.draw(st.sampled_from([0, 0, 0, 1]))
        end = offset + gap + count * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [offset + gap, end]}
        offset = end
    raw = json.dumps(dict(reversed(header.items()))).encode()
    (tmp_path / "file").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))
    agrees_with_the_library(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 8 + b"{}", "not a safetensors file"),
        ((99).to_bytes(8, "little") + b"{}", "claims a header of 99 bytes in a file of 10"),
        ((2).to_bytes(8, "little") + b"[]", "malformed header"),
        ((17).to_bytes(8, "little") + b'{"a":{},"a":null}', "the key 'a' stands twice"),
    ],
)
def test_says_what_is_wrong(tmp_path, content, what):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=what):
        read_header(tmp_path / "file")


def test_a_missing_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "file")


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    save_file({"w": torch.ones(100)}, tmp_path / "file")
    entry = read_header(tmp_path / "file")["w"]
    with open(tmp_path / "file", "r+b") as file:
        file.truncate(entry.start + 8)
    with pytest.raises(CheckpointError, match="ends before its tensors do"):
        entry.read()


def test_metadata_is_added_to_the_format(tmp_path):
    head, _ = plan_file([], {"about": "this"})
    (tmp_path / "file").write_bytes(head)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "about": "this"}


def test_a_tensor_that_is_not_what_was_announced_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        write_file(tmp_path / "file", [TensorSpec("w", "F32", (2,))], lambda name: torch.ones(3))


def test_every_dtype_is_one_of_the_library(tmp_path):
    for dtype, name in DTYPE_NAMES.items():
        save_file({"w": torch.zeros(2).to(dtype)}, tmp_path / "file")
        assert read_header(tmp_path / "file")["w"].dtype == name


def test_the_library_refuses_what_it_refuses_with_its_own_error(tmp_path):
    """The comparisons above stand on this: safe_open raises for a bad file instead of giving something back."""
    (tmp_path / "file").write_bytes(VALID[:-1])
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "file", "pt").__enter__()
