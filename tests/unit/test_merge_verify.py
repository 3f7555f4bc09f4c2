"""The check of a result finds what was written wrongly, and is left out on demand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merge_oracle import LAYOUT, PROJECTIONS, random_adapter, save_base

from mistral_prune_lora import merge as merge_module
from mistral_prune_lora import merge_stream
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.merge import merge_adapters
from mistral_prune_lora.pruning.mistral_merge_adapter import main
from mistral_prune_lora.safetensors_file import read_header

MERGED, COPIED = "model.layers.4.mlp.up_proj.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def inputs(request, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    dense, parts = save_base(folder, torch.bfloat16)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "use_dora": request.param}
    return parts["A"], random_adapter(folder / "adapter", dense, settings, layers=LAYOUT.kept)


def flip(file: Path, name: str, place: float) -> None:
    """Change one bit of a tensor in a file."""
    entry = read_header(file)[name]
    with open(file, "r+b") as stream:
        stream.seek(entry.start + int(place * (entry.nbytes - 1)))
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture
def spoil(monkeypatch):
    """Have something done to each weight file right after it was written."""

    def after_writing(change):
        stream_file = merge_module.stream_file

        def spoiling(path, items, **options):
            digest = stream_file(path, items, **options)
            change(path)
            return digest

        monkeypatch.setattr(merge_module, "stream_file", spoiling)

    return after_writing


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("name", [MERGED, COPIED])
def test_a_flipped_bit_on_disk_is_found(name, place, inputs, tmp_path, spoil):
    spoil(lambda path: flip(path, name, place))
    with pytest.raises(CheckpointError, match="its bytes are not those that were written"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_verify_leaves_the_check_out(inputs, tmp_path, spoil, capsys):
    spoil(lambda path: flip(path, COPIED, 0.5))
    words = ["--base_model", inputs[0], "--adapter_path", inputs[1], "--output_dir", tmp_path / "out", "--no_verify"]
    assert main([str(word) for word in words]) == 0
    assert "verified" not in capsys.readouterr().err
    assert (tmp_path / "out/merge.json").is_file()


def test_wrong_arithmetic_is_found(inputs, tmp_path, monkeypatch):
    """The digest is of what was computed, so it cannot tell; the rows that are computed again can."""
    add_to = merge_stream.Factors.add_to

    def too_much(self, weight, rows):
        return add_to(self, weight, rows).mul_(1.02)

    monkeypatch.setattr(merge_stream.Factors, "add_to", too_much)
    with pytest.raises(CheckpointError, match="is not the merged one"):
        merge_adapters(inputs[0], [inputs[1]], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_something_else_is_found(inputs, tmp_path, monkeypatch):
    read_into = merge_stream.read_into

    def zeros(descriptor, view, start, path):
        read_into(descriptor, view, start, path)
        view[:1] = b"\0"

    monkeypatch.setattr(merge_stream, "read_into", zeros)
    with pytest.raises(CheckpointError, match=r"not the one that was copied|not the merged one"):
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
