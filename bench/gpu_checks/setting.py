"""Where a check runs, how large, and what it runs on: a random model, its parts, an adapter, windows of random ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig
from random_model import mistral_config, write_model
from safetensors.torch import save_file
from transformers import MistralConfig

from mistral_prune_lora.checkpoints.tokenizer import tokenizer_identity
from mistral_prune_lora.distillation.settings import PROJECTIONS
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.architecture import empty_layer
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.text.windows import Windows, WindowsIdentity, ids_digest


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        geometry: arguments of `random_model.mistral_config`.
        deviation: of the random weights.
        layout: the layers of A, B and C.
        windows, seqlen: to evaluate; a training takes as many of them as it needs, cut to `trained_seqlen`.
        trained_seqlen: token ids in a window that is trained on.
        batch: windows that go through a layer together.
        resident: layers on the device at once.
        rank: of adapters.
    """

    geometry: dict
    deviation: float
    layout: Layout
    windows: int
    seqlen: int
    trained_seqlen: int
    batch: int
    resident: int
    rank: int


# 1.0 billion parameters: 2.0 GB in bf16, 4.0 GB in float32. A larger one would be minutes of a slow disk.
LARGE = Size(
    {"layers": 16, "hidden": 2048, "intermediate": 7168, "heads": 16, "kv_heads": 4, "vocabulary": 32000},
    0.02, Layout(16, (8, 9), (10, 11)), 32, 1024, 512, 4, 6, 16,
)  # fmt: skip
SMALL = Size(
    {"layers": 6, "hidden": 64, "intermediate": 160, "heads": 4, "kv_heads": 2, "vocabulary": 300},
    0.08, Layout(6, (2,), (3,)), 5, 48, 24, 2, 2, 4,
)  # fmt: skip
SIZES = {"large": LARGE, "small": SMALL}


@dataclass(frozen=True)
class Setting:
    """Where a check runs, and what on.

    Attributes:
        device: that is checked.
        size: how large everything is.
        folder: where files go; what one check has made there, another one uses, also in another process.
    """

    device: torch.device
    size: Size
    folder: Path

    @cached_property
    def config(self) -> MistralConfig:
        """The model's configuration."""
        return mistral_config(**self.size.geometry)

    @cached_property
    def dense(self) -> Path:
        """The dense model, bf16, from seed 0."""
        if not (folder := self.folder / "dense").exists():
            torch.manual_seed(0)
            write_model(folder, self.config, deviation=self.size.deviation)
        return folder

    @cached_property
    def parts(self) -> dict[str, Path]:
        """A, B and C, cut out of the dense model."""
        a, bundles = self.folder / "A", self.folder / "bundles"
        if not a.exists():
            prune_model(self.dense, self.size.layout, save_dir=a, save_removed_dir=bundles)
        return {"A": a, "B": bundles / "B", "C": bundles / "C"}

    @cached_property
    def adapter(self) -> Path:
        """A random LoRA adapter of all projections of A, float32, as PEFT writes one."""
        folder, rank = self.folder / "adapter", self.size.rank
        if folder.exists():
            return folder
        folder.mkdir()
        modules, draw, tensors = dict(empty_layer(self.config, 0).named_modules()), torch.Generator().manual_seed(1), {}
        for layer in self.size.layout.kept:
            for name, module in modules.items():
                if name.endswith(PROJECTIONS):
                    place = f"base_model.model.model.layers.{layer}.{name}"
                    rows, columns = module.weight.shape
                    for factor, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                        tensors[f"{place}.{factor}.weight"] = torch.randn(shape, generator=draw) * self.size.deviation
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM",
            layers_to_transform=list(self.size.layout.kept),
        ).save_pretrained(folder)  # fmt: skip
        return folder

    @cached_property
    def windows(self) -> Windows:
        """To evaluate: int32, shape (windows, seqlen)."""
        return self._random_windows(self.size.windows, self.size.seqlen)

    @cached_property
    def trained(self) -> Windows:
        """To train on: int32, shape (4, trained_seqlen)."""
        return self._random_windows(4, self.size.trained_seqlen)

    def synchronise(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _random_windows(self, count: int, seqlen: int) -> Windows:
        shape, draw = (count, seqlen), torch.Generator().manual_seed(2)
        ids = torch.randint(self.size.geometry["vocabulary"], shape, generator=draw, dtype=torch.int32)
        text, tokenizer = ("random", "test", "nowhere", "0" * 64), (str(self.dense), tokenizer_identity(self.dense))
        told = (*text, ids_digest(ids), *tokenizer, ids.numel(), seqlen, count, count)
        return Windows(ids, WindowsIdentity(*told))


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, in which a GPU would round float32 to ten bits before it multiplies."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)
