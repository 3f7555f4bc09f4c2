"""Properties of the merge over random shapes, ranks, dtypes, orders of keys and numbers of threads."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mistral_prune_lora.merging import arithmetic as merge_arithmetic
from mistral_prune_lora.merging import stream as merge_stream
from mistral_prune_lora.merging.merge import merge_adapters

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SETTINGS = settings(max_examples=60, deadline=None)
TARGETS = ["q_proj", "up_proj"]
MODULES = {"q_proj": "self_attn.q_proj", "up_proj": "mlp.up_proj"}
OTHERS = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


@st.composite
def cases(draw):
    """A bundle and an adapter, as numbers: shapes of the two projections, rank, dtypes, layers, orders, scaling."""
    return {
        "shapes": [draw(st.tuples(st.integers(1, 300), st.integers(1, 90))) for _ in TARGETS],
        "rank": draw(st.integers(1, 20)),
        "alpha": draw(st.integers(1, 40) | st.floats(0.1, 9)),
        "rslora": draw(st.booleans()),
        "dtype": draw(DTYPES),
        "adapter_dtype": draw(DTYPES),
        "layers": draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True)),
        "seed": draw(st.integers(0, 99)),
        "order": draw(st.randoms(use_true_random=False)),
        "block": draw(st.sampled_from([1, 5000, 40_000, 1 << 21])),
        "threads": draw(st.sampled_from([1, 2])),
    }


@contextmanager
def folder_with(case: dict):
    """A temporary folder with `bundle` and `adapter`; yields it and the expected tensors of each layer file."""
    generator = torch.Generator().manual_seed(case["seed"])
    folder = Path(tempfile.mkdtemp())
    factors, expected = {}, {}
    (folder / "bundle").mkdir()
    (folder / "adapter").mkdir()
    scaling = case["alpha"] / (case["rank"] ** 0.5 if case["rslora"] else case["rank"])
    for layer in case["layers"]:
        tensors = {
            f"{name}.weight": torch.randn(7, generator=generator).to(case["dtype"])
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        tensors |= {f"{name}.weight": torch.randn(3, 5, generator=generator).to(case["dtype"]) for name in OTHERS}
        merged = dict(tensors)
        for name, (rows, columns) in zip(TARGETS, case["shapes"], strict=True):
            weight = torch.randn(rows, columns, generator=generator).to(case["dtype"])
            a = torch.randn(case["rank"], columns, generator=generator).to(case["adapter_dtype"])
            b = torch.randn(rows, case["rank"], generator=generator).to(case["adapter_dtype"])
            module = MODULES[name]
            tensors[f"{module}.weight"] = weight
            for role, factor in (("A", a), ("B", b)):
                factors[f"base_model.model.model.layers.{layer}.{module}.lora_{role}.weight"] = factor
            merged[f"{module}.weight"] = weight.clone()
            # MKL rounds a few small odd products otherwise with more threads; the merge always takes one.
            torch.set_num_threads(1)
            merged[f"{module}.weight"] += (b.float() @ a.float()) * scaling
        save_file(shuffled(tensors, case["order"]), folder / f"bundle/layer_{layer:03d}.safetensors")
        expected[layer] = merged
    write_unsorted(shuffled(factors, case["order"]), folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": case["rank"], "lora_alpha": case["alpha"], "use_rslora": case["rslora"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps({**config, "target_modules": TARGETS}))
    try:
        yield folder, expected
    finally:
        shutil.rmtree(folder)


def shuffled(tensors: dict, random) -> dict:
    names = list(tensors)
    random.shuffle(names)
    return {name: tensors[name] for name in names}


def write_unsorted(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A valid safetensors file whose tensors lie in the order of the dict, which the library never writes."""
    header, body = {}, b""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert load_file(path).keys() == tensors.keys()


@SETTINGS
@given(cases())
def test_bits_and_bytes(case):
    """Each file is, byte for byte, what the library would write of W + (B A) s."""
    with folder_with(case) as (folder, expected), pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_stream, "_BLOCK_BYTES", case["block"])
        torch.set_num_threads(case["threads"])
        try:
            merge_adapters(folder / "bundle", [folder / "adapter"], folder / "out", device="cpu")
        finally:
            assert torch.get_num_threads() == case["threads"]
            torch.set_num_threads(2)
        record = json.loads((folder / "out/merge.json").read_text())
        assert sorted(p.name for p in (folder / "out").glob("*.safetensors")) == [
            f"layer_{layer:03d}.safetensors" for layer in sorted(case["layers"])
        ]
        for layer, tensors in expected.items():
            name = f"layer_{layer:03d}.safetensors"
            save_file(tensors, folder / "expected", metadata={"format": "pt"})
            assert (folder / "out" / name).read_bytes() == (folder / "expected").read_bytes()
            assert record["outputs"][name] == hashlib.sha256((folder / "expected").read_bytes()).hexdigest()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 3000), st.sampled_from([2, 4]), st.integers(1, 1 << 22))
def test_blocks_cover_the_tensor_in_rows_that_keep_the_kernel(rows, columns, itemsize, block):
    row = columns * itemsize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_stream, "_BLOCK_BYTES", block)
        item = FakeItem(rows, columns, itemsize, updates=(object(),))
        blocks = list(merge_stream.blocks_of(item))
        copied = list(merge_stream.blocks_of(FakeItem(min(rows, 9), min(columns, 99), itemsize, updates=())))
    assert_contiguous(blocks, rows * row)
    assert_contiguous(copied, min(rows, 9) * min(columns, 99) * itemsize)
    counts = [(last - first) // row for first, last in blocks]
    assert all(first % row == 0 for first, _ in blocks)
    assert all(count % 64 == 0 for count in counts[:-1])
    assert counts[-1] >= min(rows, 64)
    assert max(counts) * row < max(block, 64 * row) + 64 * row
    assert all(last - first <= max(block, itemsize) and first % itemsize == 0 for first, last in copied)


def assert_contiguous(blocks: list[tuple[int, int]], nbytes: int) -> None:
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
    assert blocks[-1][1] == nbytes


class FakeItem:
    """What blocks_of asks of an item."""

    def __init__(self, rows: int, columns: int, itemsize: int, updates: tuple) -> None:
        self.entry = self.spec = self
        self.updates, self.dtype = updates, {2: "BF16", 4: "F32"}[itemsize]
        self.shape, self.itemsize, self.nbytes = (rows, columns), itemsize, rows * columns * itemsize


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (3000, 1000), (577, 8192), (4097, 640)])
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_large_products_keep_their_bits_in_blocks(shape, rank):
    """Shapes of a real model's size, and the number of threads that the whole product is computed with."""
    generator = torch.Generator().manual_seed(rank)
    b, a = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    whole = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole.append(b @ a)
    assert torch.equal(*whole)
    item = FakeItem(*shape, 2, updates=(object(),))
    rows = [(first // (2 * shape[1]), last // (2 * shape[1])) for first, last in merge_stream.blocks_of(item)]
    assert len(rows) > 1
    with merge_arithmetic.exact_arithmetic():
        assert torch.equal(torch.cat([b[first:last] @ a for first, last in rows]), whole[0])


def test_the_arithmetic_is_exact_while_it_lasts():
    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pytest.raises(ValueError, match="inside"), merge_arithmetic.exact_arithmetic():
            assert torch.get_num_threads() == 1
            assert torch.backends.cuda.matmul.allow_tf32 is False
            assert torch.is_inference_mode_enabled()
            raise ValueError("inside")
        assert (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32) == (before[0], True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[1]
