"""What identifies a run of layers: everything that its numbers depend on, so that equal records mean equal bits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.tensor_names import EMBEDDING, NORM
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.models.ends import outside_entries
from mistral_prune_lora.provenance import record_sha256, versions
from mistral_prune_lora.storage.digests import tensors_digests
from mistral_prune_lora.storage.dtypes import COMPUTE_NAMES
from mistral_prune_lora.storage.safetensors_file import TensorEntry
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.text.windows import Windows

_HASHING_THREADS = min(8, os.cpu_count() or 1)
_AGAIN = "Run its segment again"
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
class RunRecord:
    """What was run so far on which windows.

    Attributes:
        ids_sha256, windows, seqlen: of the token ids.
        dtype: of weights and hidden states: "bf16", "fp16" or "fp32".
        config_sha256: of what the model's configuration says about arithmetic.
        layers: original indices, in the order that they were run in.
        parameters: of all that was run, the embedding excepted until the head is counted.
        weights: sha256 over the tensors of the embedding, of each layer, and of norm and head, by name. A layer's is
            over its tensors' names, dtypes, shapes and bytes: equal layers are equal whatever file they lie in.
        steps: what decides how the same arithmetic is rounded, for consecutive layers that one machine ran.
        dense: identifies the dense model's answers that the scores were compared with; None without them.
    """

    ids_sha256: str
    windows: int
    seqlen: int
    dtype: str
    config_sha256: str
    layers: list[int]
    parameters: int
    weights: dict[str, str]
    steps: list[dict]
    dense: str | None = None

    @classmethod
    def start(cls, model: Checkpoint, windows: Windows, dtype: torch.dtype) -> RunRecord:
        """The record of a run that stands at the token ids, before any layer; errors as for `after`."""
        embedding = outside_entries(model)[EMBEDDING]
        return cls(
            ids_sha256=windows.identity.ids_sha256,
            windows=len(windows),
            seqlen=windows.seqlen,
            dtype=COMPUTE_NAMES[dtype],
            config_sha256=config_sha256(model),
            layers=[],
            parameters=0,
            weights={"embed_tokens": checked_sha256(model, {"weight": embedding})},
            steps=[],
        )

    @classmethod
    def parse(cls, content: Mapping, where: str | Path) -> RunRecord:
        """The record in a file's metadata; DataError if it is none."""
        kinds = {"str": str, "int": int, "list[int]": list, "list[dict]": list, "dict[str, str]": dict}
        wanted = {field.name: kinds[str(field.type)] for field in fields(cls) if field.name != "dense"}
        if any(type(content.get(name)) is not kind for name, kind in wanted.items()):
            raise DataError("does not say what was run", where=where, mend=_AGAIN)
        return cls(**{name: content[name] for name in wanted})

    def after(self, sources: Sequence[LayerSource], compute: Compute) -> RunRecord:
        """The record after more layers: their digests, their parameters, and the machine that ran them.

        Raises:
            CheckpointError: weights are not what the record of whoever wrote them says.
        """
        if not sources:
            return self
        held = [source.checkpoint.layer(source.index) for source in sources]
        # Hashing and reading let other threads run; beside a GPU's speed, one thread over 14 GB would be felt.
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            digests = list(pool.map(checked_sha256, [source.checkpoint for source in sources], held))
        weights = dict(self.weights)
        for source, digest in zip(sources, digests, strict=True):
            weights[f"layers.{source.index:03d}"] = digest
            for adapter in source.adapters:
                weights[f"layers.{source.index:03d}+{adapter.name}"] = adapter.digest(source.index)
        layers, machine = [source.index for source in sources], _machine(compute)
        steps = list(self.steps)
        if steps and {k: v for k, v in steps[-1].items() if k != "layers"} == machine:
            steps[-1] = {**machine, "layers": [*steps[-1]["layers"], *layers]}
        else:
            steps.append({**machine, "layers": layers})
        return replace(
            self,
            layers=[*self.layers, *layers],
            parameters=self.parameters + sum(parameters(entries.values()) for entries in held),
            weights=weights,
            steps=steps,
        )

    def with_head(self, model: Checkpoint) -> RunRecord:
        """The record of scores: norm, head and the parameters around the layers are in it too; errors as `after`."""
        outside = outside_entries(model)
        named = {"norm": outside[NORM], "lm_head": outside[head_name(model)]}
        digests = {name: checked_sha256(model, {"weight": entry}) for name, entry in named.items()}
        counted = self.parameters + parameters(outside.values())
        return replace(self, weights=self.weights | digests, parameters=counted)

    def of_windows(self, windows: Windows) -> RunRecord:
        """The record of the same run over other windows: a shard's, or all."""
        return replace(self, ids_sha256=windows.identity.ids_sha256, windows=len(windows))

    def content(self) -> dict:
        """The record as JSON takes it."""
        content = asdict(self)
        if self.dense is None:
            del content["dense"]
        return content

    @property
    def sha256(self) -> str:
        """Equal for equal records."""
        return record_sha256(self.content())

    def other_than(self, other: RunRecord) -> str | None:
        """What another run has that this one has not: the first field that differs; None for the same numbers.

        Machines and batch sizes, which only move roundings, may differ.
        """
        keys = ("ids_sha256", "windows", "seqlen", "config_sha256", "dtype", "layers", "weights")
        return next((key for key in keys if getattr(self, key) != getattr(other, key)), None)

    def check_continues(self, start: RunRecord, where: str | Path) -> None:
        """Raise a DataError unless this record, found in a file, is of the windows, dtype and kind of model of another.

        Args:
            start: `RunRecord.start` of what is to be run on.
            where: the file.
        """
        for key in ("ids_sha256", "windows", "seqlen", "dtype", "config_sha256"):
            found, wanted = getattr(self, key), getattr(start, key)
            if found != wanted:
                raise DataError(f"was made with another {key} ({found}, not {wanted})", where=where, mend=_AGAIN)


def parameters(entries: Iterable[TensorEntry]) -> int:
    """How many numbers some tensors hold."""
    return sum(math.prod(entry.shape) for entry in entries)


def checked_sha256(checkpoint: Checkpoint, entries: Mapping[str, TensorEntry]) -> str:
    """The `tensors_sha256` of some of a checkpoint's tensors, whose bytes are held against its record on the way.

    Raises:
        CheckpointError: they are not what the record says was written.
    """
    digest, checksums = tensors_digests(entries)
    checkpoint.check_tensors(checksums, checksums.__getitem__)
    return digest


def tensors_sha256(entries: Mapping[str, TensorEntry]) -> str:
    """The sha256 over the names, dtypes, shapes and bytes of some tensors, in the order of their names.

    Remembered within the process for as long as the files stay as they are.
    """
    return tensors_digests(entries)[0]


def _machine(compute: Compute) -> dict:
    """What decides how the same arithmetic is rounded: device, batch size, threads, versions."""
    return {
        "device": compute.device.type,
        "batch_size": compute.batch_size,
        "threads": torch.get_num_threads() if compute.device.type == "cpu" else None,
        **versions("torch", "transformers"),
    }


def config_sha256(model: Checkpoint) -> str:
    """The sha256 of what a model's configuration says about arithmetic."""
    return record_sha256({key: value for key, value in model.config.items() if key not in _CONFIG_WITHOUT_EFFECT})
