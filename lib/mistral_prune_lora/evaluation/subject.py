"""What is evaluated: a model, the bundles restored into it, adapters left unmerged; and what identifies a run of it."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.pruning_identity import check_same_pruning
from mistral_prune_lora.errors import CheckpointError, DataError, LayoutError
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.models.load import head_name, model_config
from mistral_prune_lora.provenance import record_sha256, versions
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.dtypes import COMPUTE_NAMES
from mistral_prune_lora.storage.safetensors_file import TensorEntry
from mistral_prune_lora.streaming.layers import Compute, LayerSource, UnmergedAdapter
from mistral_prune_lora.text.windows import Windows

_STAGE_SIGN = {"A": "A", "AB": "AB", "FULL": "ABC"}
_EMBEDDING = "model.embed_tokens.weight"
_CHUNK_BYTES = 1 << 22
_HASHING_THREADS = min(8, os.cpu_count() or 1)
# Only names and paths; two configurations that differ in nothing else compute the same.
_CONFIG_WITHOUT_EFFECT = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "architectures",
    "torch_dtype",
    "dtype",
}


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, with whatever can be restored into it.

    Attributes:
        model: an A model, a merged A, or a dense model.
        bundles: bundles by part, "B" and "C".
        adapters: LoRA adapters to leave unmerged, by the part whose layers they are for.
        name: for labels; the model directory's name if empty.
    """

    model: Checkpoint
    bundles: Mapping[str, Checkpoint] = field(default_factory=dict)
    adapters: Mapping[str, tuple[UnmergedAdapter, ...]] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        """Raise a LayoutError if the parts are of different prunings."""
        check_same_pruning(self._parts)

    @property
    def _parts(self) -> list[Path]:
        return [self.model.path, *(bundle.path for bundle in self.bundles.values())]

    @property
    def pruning_identity(self) -> str | None:
        """The identity of the pruning that all parts are of; None if one of them carries none."""
        return check_same_pruning(self._parts)

    @classmethod
    def open(cls, model_dir: str | Path, bundles: Mapping[str, str | Path] | None = None, **kwargs) -> Subject:
        """Open the directories; CheckpointError or LayoutError if they are not what they should be."""
        return cls(open_checkpoint(model_dir), {p: open_checkpoint(b) for p, b in (bundles or {}).items()}, **kwargs)

    @property
    def layout(self) -> Layout:
        """The parts, as the manifest says, or else the bundles; a model without a manifest keeps all its layers."""
        layout = self.model.layout or Layout(self.model.config["num_hidden_layers"])
        return layout.assigned({part: b.layers for part, b in self.bundles.items()}, where=self.model.path)

    @property
    def is_dense(self) -> bool:
        """Whether the model runs without none of its layers."""
        return not self.layout.dropped

    def sources(self, layers: Sequence[int]) -> list[LayerSource]:
        """Where the layers' weights lie.

        Raises:
            LayoutError: a layer's bundle is not given or does not hold it; the model lacks a layer that it should keep.
        """
        return [self._source(layer) for layer in layers]

    def _source(self, layer: int) -> LayerSource:
        part = self.layout.part_of(layer)
        holder = self.model if part == "A" else self.bundles.get(part)
        if holder is None:
            raise LayoutError(
                f"layer {layer} was dropped into bundle {part}, and no such bundle is given",
                where=self.model.path,
                mend=f"Give the {part} bundle that was cut from this model, or leave this stage out",
            )
        if layer not in holder.layers:
            raise LayoutError(
                f"there are no weights of layer {layer}, which belongs to {part}",
                where=holder.path,
                mend="Use a model and bundles of one pruning, with its manifest.json",
            )
        return LayerSource(layer, holder, self.adapters.get(part, ()))

    def label(self, stage: str) -> str:
        """A_merged[A], A_merged[AB], A_merged[ABC]; for a dense model its name and [dense]; with + before adapters."""
        name = self.name or self.model.path.name
        names = "".join(f"+{a.name}" for part in PARTS_OF_STAGE[stage] for a in self.adapters.get(part, ()))
        return f"{name}{names}[{'dense' if self.is_dense else _STAGE_SIGN[stage]}]"

    def parameters(self, layers: Sequence[int]) -> int:
        """Parameters of embedding, final norm, head (tied ones once) and the given layers, adapters not counted."""
        return _parameters(outside_entries(self.model).values()) + sum(
            _parameters(source.checkpoint.layer(source.index).values()) for source in self.sources(layers)
        )


def outside_entries(model: Checkpoint) -> dict[str, TensorEntry]:
    """The tensors around the layers: embedding, final norm, and head unless that is the embedding.

    Raises:
        CheckpointError: one is missing.
    """
    names = dict.fromkeys([_EMBEDDING, "model.norm.weight", head_name(model)])
    missing = [name for name in names if name not in model.entries]
    if missing:
        raise CheckpointError(f"has no tensor {missing[0]}", where=model.path, mend="Fetch or write the model again")
    return {name: model.entries[name] for name in names}


def start_record(model: Checkpoint, windows: Windows, dtype: torch.dtype) -> dict:
    """The record of a run that stands at the token ids: what its numbers depend on, before any layer."""
    embedding = outside_entries(model)[_EMBEDDING]
    return {
        "ids_sha256": windows.identity.ids_sha256,
        "windows": len(windows),
        "seqlen": windows.seqlen,
        "dtype": COMPUTE_NAMES[dtype],
        "config_sha256": config_digest(model),
        "layers": [],
        "parameters": 0,
        "weights": {"embed_tokens": tensors_digest({"weight": embedding})},
        "steps": [],
    }


def extend_record(record: Mapping, sources: Sequence[LayerSource], compute: Compute) -> dict:
    """The record after more layers: their digests, their parameters, and the machine that ran them.

    A layer's digest is the sha256 over its tensors' names, dtypes, shapes and bytes, so equal layers have equal digests
    whatever file they lie in.
    """
    weights = dict(record["weights"])
    parameters = record["parameters"]
    held = [source.checkpoint.layer(source.index) for source in sources]
    # Hashing and reading let other threads run; beside a GPU's speed, one thread over 14 GB would be felt.
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = list(pool.map(tensors_digest, held))
    for source, entries, digest in zip(sources, held, digests, strict=True):
        weights[f"layers.{source.index:03d}"] = digest
        for adapter in source.adapters:
            weights[f"layers.{source.index:03d}+{adapter.name}"] = adapter.digest(source.index)
        parameters += _parameters(entries.values())
    layers = [source.index for source in sources]
    steps, machine = list(record["steps"]), machine_record(compute)
    if layers and steps and {k: v for k, v in steps[-1].items() if k != "layers"} == machine:
        steps[-1] = {**machine, "layers": [*steps[-1]["layers"], *layers]}
    elif layers:
        steps.append({**machine, "layers": layers})
    return {
        **record,
        "layers": [*record["layers"], *layers],
        "parameters": parameters,
        "weights": weights,
        "steps": steps,
    }


def machine_record(compute: Compute) -> dict:
    """What decides how the same arithmetic is rounded: device, batch size, threads, versions."""
    return {
        "device": compute.device.type,
        "batch_size": compute.batch_size,
        "threads": torch.get_num_threads() if compute.device.type == "cpu" else None,
        **versions("torch", "transformers"),
    }


def check_continues(file: ActivationReader, model: Checkpoint, windows: Windows, compute: Compute) -> None:
    """Raise a DataError if activations on disk are not of these windows, this dtype and this kind of model."""
    wanted = start_record(model, windows, compute.dtype)
    told = {key: file.run.get(key) for key in wanted}
    shape = (*windows.ids.shape, model_config(model).hidden_size)
    compared = [(key, told[key], wanted[key]) for key in ("ids_sha256", "windows", "seqlen", "dtype", "config_sha256")]
    for key, found, needed in (*compared, ("shape", (file.shape, file.dtype), (shape, compute.dtype))):
        if found != needed:
            raise DataError(
                f"was made with another {key} ({found}, not {needed})", where=file.path, mend="Run its segment again"
            )
    if any(type(told[key]) is not type(wanted[key]) for key in wanted):
        raise DataError("does not say what was run", where=file.path, mend="Run its segment again")


def config_digest(model: Checkpoint) -> str:
    """The sha256 of what a model's configuration says about arithmetic."""
    told = {key: value for key, value in model.config.items() if key not in _CONFIG_WITHOUT_EFFECT}
    return record_sha256(told)


def tensors_digest(entries: Mapping[str, TensorEntry]) -> str:
    """The sha256 over the names, dtypes, shapes and bytes of some tensors, in the order of their names.

    Remembered within the process for as long as the files stay as they are.
    """
    known = []
    for name, entry in sorted(entries.items()):
        state = entry.file.stat()
        known.append((name, entry, state.st_mtime_ns, state.st_size))
    return _digest(tuple(known))


@functools.cache
def _digest(known: tuple[tuple[str, TensorEntry, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, entry, _, _ in known:
        digest.update(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                digest.update(chunk)
                left -= len(chunk) or left
    return digest.hexdigest()


def _parameters(entries) -> int:
    return sum(math.prod(entry.shape) for entry in entries)
