"""The check of a result finds what was written wrongly, and is left out on demand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from merge_oracle import LAYOUT, PROJECTIONS, random_adapter, save_base

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.merging import merge as merge_module
from mistral_prune_lora.merging import stream as merge_stream
from mistral_prune_lora.merging import verify as merge_verify
from mistral_prune_lora.merging.arithmetic import Factors
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.pruning.mistral_merge_adapter import main
from mistral_prune_lora.storage import streamed_file
from mistral_prune_lora.storage.safetensors_file import plan_file, read_header

MERGED, COPIED, HEADER = "model.layers.4.mlp.up_proj.weight", "lm_head.weight", "the header"
BUFFER = 16384  # of the 180 kB of weights, so that most buffers come back while others are being written


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def inputs(request, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    dense, parts = save_base(folder, torch.bfloat16)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "use_dora": request.param}
    return parts["A"], random_adapter(folder / "adapter", dense, settings, layers=LAYOUT.kept)


@pytest.fixture
def flips_on_disk(monkeypatch, inputs):
    """Have one bit of a tensor changed on the disk, right after it was written there."""
    pwrite = os.pwrite
    entries = read_header(inputs[0] / "model.safetensors")  # of the same tensors, so of the same offsets

    def flip(name: str, place: float) -> None:
        start, nbytes = (0, 8) if name == HEADER else (entries[name].start, entries[name].nbytes)
        target = start + int(place * (nbytes - 1))

        def spoiling(descriptor, data, offset):
            done = pwrite(descriptor, data, offset)
            if offset <= target < offset + done:
                other = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
                byte = os.pread(other, 1, target)[0]
                pwrite(other, bytes([byte ^ 1]), target)
                os.fsync(other)
                os.close(other)
            return done

        monkeypatch.setattr(os, "pwrite", spoiling)

    return flip


@pytest.fixture(params=["direct", "through the page cache"])
def file_system(request, monkeypatch):
    monkeypatch.setattr(streamed_file, "_BUFFER_BYTES", BUFFER)
    monkeypatch.setattr(streamed_file, "_SYNC_EVERY_BEHIND", 4 * BUFFER)
    if request.param != "direct":
        monkeypatch.delattr(os, "O_DIRECT")


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("name", [MERGED, COPIED, HEADER])
def test_a_flipped_bit_on_disk_is_found(name, place, inputs, tmp_path, flips_on_disk, file_system):
    """Wherever it is: in the middle of a copied tensor, or in a row that is not computed again."""
    flips_on_disk(name, place)
    with pytest.raises(CheckpointError, match=f"the bytes of {name} are not those that were written"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_verify_leaves_the_check_out(inputs, tmp_path, flips_on_disk, capsys):
    flips_on_disk(COPIED, 0.5)
    words = ["--base_model", inputs[0], "--adapter_path", inputs[1], "--output_dir", tmp_path / "out", "--no_verify"]
    assert main([str(word) for word in words]) == 0
    assert "verified" not in capsys.readouterr().err
    assert (tmp_path / "out/merge.json").is_file()


def test_the_recorded_digest_is_that_of_the_file(inputs, tmp_path, file_system):
    written = {}
    for name, verify in (("checked", True), ("unchecked", False)):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / name, verify=verify)
        record = (tmp_path / name / "merge.json").read_text()
        written[name] = file_sha256(tmp_path / name / "model.safetensors")
        assert written[name] in record
    assert written["checked"] == written["unchecked"]


def test_wrong_arithmetic_is_found(inputs, tmp_path, monkeypatch):
    """What is written wrongly comes back as it was written; the rows that are computed again tell."""
    add_to = Factors.add_to

    def too_much(self, weight, rows):
        return add_to(self, weight, rows).mul_(1.02)

    monkeypatch.setattr(Factors, "add_to", too_much)
    with pytest.raises(CheckpointError, match="is not the merged one"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [0, 37, 74, 111])
def test_one_wrong_value_in_a_row_that_is_computed_again_is_found(row, inputs, tmp_path, monkeypatch, file_system):
    """Also where a row lies in two buffers."""
    merge_rows = merge_stream.merge_rows

    def slightly_wrong(rows, first, factors, device):
        merge_rows(rows, first, factors, device)
        if rows.shape == (112, 64):  # gate_proj and up_proj; the last of the row
            rows[row, -1] += 1

    monkeypatch.setattr(merge_stream, "merge_rows", slightly_wrong)
    with pytest.raises(CheckpointError, match=f"row {row} of .*_proj.weight is not the merged one"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")


@pytest.mark.parametrize("end", [0, -1])
def test_a_copy_of_something_else_is_found(end, inputs, tmp_path, monkeypatch, file_system):
    monkeypatch.setattr(merge_verify, "_EDGE_NUMBERS", 5)
    read_into = merge_stream.read_into

    def spoiling(descriptor, view, start, path):
        read_into(descriptor, view, start, path)
        if len(view) == 2 * 96 * 64:  # of the embedding and the head, which no adapter changes
            view[end] ^= 1

    monkeypatch.setattr(merge_stream, "read_into", spoiling)
    with pytest.raises(CheckpointError, match=r"(lm_head|embed_tokens).weight is not the one that was copied"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")


def test_a_missing_tensor_is_found(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_stream, "plan_file", lambda specs: plan_file(s for s in specs if s.name != COPIED))
    with pytest.raises(CheckpointError, match="its header is not the one that was planned"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_a_file_that_ends_early_is_found(kept, inputs, tmp_path, monkeypatch):
    """Its header is read once more when it is complete."""
    stream_file = merge_module.stream_file

    def cut(path, items, **options):
        digest = stream_file(path, items, **options)
        os.truncate(path, int(path.stat().st_size * kept))
        return digest

    monkeypatch.setattr(merge_module, "stream_file", cut)
    with pytest.raises(CheckpointError, match=r"where its header promises|cut short"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_never_came_by_are_missed(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "stream_file", lambda path, items, **options: "")
    with pytest.raises(CheckpointError, match="it ends before its tensors do"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_right_results_pass(dtype, dora, tmp_path):
    """The bound of the check holds for every dtype, for large ranks and for adapters in turn."""
    dense, parts = save_base(tmp_path, dtype)
    settings = {"r": 48, "lora_alpha": 31, "target_modules": PROJECTIONS, "use_dora": dora}
    adapters = [random_adapter(tmp_path / f"adapter{i}", dense, settings, seed=i, layers=LAYOUT.kept) for i in range(3)]
    report = merge_adapters(parts["A"], adapters, tmp_path / "out")
    assert report.verified == 2 * 4 * sum(
        shape[1] for shape in ((96, 64), (48, 64), (48, 64), (64, 96), (112, 64), (112, 64), (64, 112))
    )
