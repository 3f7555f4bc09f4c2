"""Model and bundle directories as one thing: named tensors under their original layer indices, read on demand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_prune_lora.checkpoints.directories import (
    INDEX_FILE,
    SINGLE_FILE,
    bundle_layers,
    is_bundle_dir,
    is_model_dir,
    layer_files,
    weight_files,
)
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.manifest import MANIFEST, read_layout, read_manifest, tells_depth
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX, layer_prefix
from mistral_prune_lora.checkpoints.written import Written, read_written
from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage.digests import file_digest, tensor_checksum
from mistral_prune_lora.storage.json_file import read_json
from mistral_prune_lora.storage.plain_file import lies_there
from mistral_prune_lora.storage.safetensors_file import TensorEntry, read_header

if TYPE_CHECKING:
    import torch

_STORED_LAYER_PREFIX = re.compile(r"(?:model\.){0,2}layers\.(\d+)\.")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model directory or bundle directory.

    Attributes:
        path: the directory.
        kind: "model" or "bundle".
        entries: tensors by canonical name (`model.layers.21.self_attn.q_proj.weight`, `lm_head.weight`), original layer
            indices, in the order of files and bytes.
        config: the parsed config.json of a model, with the dense model's num_hidden_layers; {} for a bundle.
        layout: the parts of the model that the manifest describes; None without a manifest.
        written: what the record in the directory says of the weights; None without one that has digests.
        beside: such records of other directories, of which some of the tensors are (see `undo.put_back`).
    """

    path: Path
    kind: str
    entries: dict[str, TensorEntry]
    config: dict = field(default_factory=dict)
    layout: Layout | None = None
    written: Written | None = None
    beside: tuple[Written, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, each once, in reading order."""
        return tuple(dict.fromkeys(entry.file for entry in self.entries.values()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by canonical name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def layers(self) -> tuple[int, ...]:
        """The original indices of the layers whose weights are here, ascending."""
        return tuple(sorted({int(m[1]) for m in map(LAYER_PREFIX.match, self.entries) if m}))

    def layer(self, index: int) -> dict[str, TensorEntry]:
        """One layer's tensors by short name (`self_attn.q_proj.weight`).

        Raises:
            CheckpointError: the layer is not here.
        """
        prefix = layer_prefix(index)
        found = {name.removeprefix(prefix): e for name, e in self.entries.items() if name.startswith(prefix)}
        if not found:
            raise CheckpointError(f"holds no weights of layer {index}, only of {list(self.layers)}", where=self.path)
        return found

    def check_tensors(
        self, entries: Iterable[TensorEntry], checksum: Callable[[TensorEntry], str] = tensor_checksum
    ) -> None:
        """Raise a CheckpointError if tensors are not what the record says; see `written.Written.check_tensors`."""
        entries = list(entries)
        for record in self._records:
            record.check_tensors([entry for entry in entries if entry.file.parent == record.record.parent], checksum)

    def check_files(self, files: Iterable[Path] | None = None, digest: Callable[[Path], str] = file_digest) -> None:
        """Raise a CheckpointError if weight files, all if none are named, are not what the record says."""
        files = list(self.files if files is None else files)
        for record in self._records:
            record.check_files([file for file in files if file.parent == record.record.parent], digest)

    @property
    def _records(self) -> list[Written]:
        return [*([self.written] if self.written else []), *self.beside]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor by canonical name, in its stored dtype or cast to `dtype`.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.entries:
            raise CheckpointError(f"has no tensor {name}", where=self.path, mend="fetch or write the model again")
        tensor = self.entries[name].read()
        return tensor if dtype is None else tensor.to(dtype)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory as a model if it has a config.json, or as a bundle if it has layer files or a bundle_meta.json.

    Reads headers only, and holds them against the record of whoever wrote them; no tensor is loaded.

    Raises:
        CheckpointError: neither; files missing, malformed or outside the directory; pickled weights only; a model of a
            family that is not taken; a header that is not what was written.
        LayoutError: the manifest or bundle_meta.json is malformed, or contradicts itself or the files.
    """
    path = Path(os.path.abspath(path))
    if is_model_dir(path):
        return _held_against_record(_open_model(path))
    if is_bundle_dir(path):
        return _held_against_record(_open_bundle(path))
    raise CheckpointError(
        "is neither a model (no config.json) nor a bundle (no layer_XXX.safetensors)"
        if path.is_dir()
        else "there is no such directory",
        where=path,
        mend="give the directory that pruning or merging wrote",
    )


def _held_against_record(opened: Checkpoint) -> Checkpoint:
    written = read_written(opened.path)
    if written is None:
        return opened
    for file in opened.files:
        written.check_header(file)
    return replace(opened, written=written)


def _open_model(path: Path) -> Checkpoint:
    config, layout = read_config(path), read_layout(path)
    stored = {name: entry for file in _model_files(path) for name, entry in file.items()}
    original: Sequence[int] = range(config["num_hidden_layers"])
    if layout and len(original) == len(layout.kept) < layout.num_layers:
        # A compact A numbers its kept layers 0..n-1; everything else here speaks of original indices.
        original = layout.kept
        config = _dense_config(config, layout.num_layers, path)
    entries = {}
    for name, entry in stored.items():
        match = _STORED_LAYER_PREFIX.match(name)
        if match:
            index = int(match[1])
            if index >= len(original):
                raise CheckpointError(
                    f"tensor {name} lies beyond the {len(original)} layers of config.json", where=path
                )
            name = layer_prefix(original[index]) + name[match.end() :]
        entries[name] = entry
    opened = Checkpoint(path, "model", entries, config, layout)
    _refuse_unknown_depth(opened)
    return opened


def _refuse_unknown_depth(model: Checkpoint) -> None:
    """Raise a CheckpointError if dropped layers have weights and nothing says how many layers the dense model has.

    These may then be the weights of the dense model, or of a compact A that counts its kept layers 0, 1, 2 ...
    """
    there = sorted(set(model.layers) & set(model.layout.dropped)) if model.layout else []
    if there and not tells_depth(read_manifest(model.path) or {}):
        raise CheckpointError(
            f"has weights of layers {there}, which the manifest says were dropped, and does not say of how many layers",
            where=model.path / MANIFEST,
            mend="write the dense model's number of layers into the manifest, as counts.L_full",
        )


def _dense_config(config: dict, num_layers: int, path: Path) -> dict:
    """The configuration of the dense model, from that of a compact A, which may list its kept layers' attention.

    Raises:
        CheckpointError: the dropped layers may have another kind of attention than the kept ones.
    """
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1 or (not kinds and config.get("use_sliding_window")):
        raise CheckpointError(
            "counts only the kept layers, whose attention differs from layer to layer, so that of the dropped ones is"
            " not known",
            where=path / "config.json",
            mend="use an A model whose config.json counts the dense model's layers",
        )
    spread = {**config, "num_hidden_layers": num_layers}
    return {**spread, "layer_types": [*kinds] * num_layers} if kinds else spread


def _model_files(path: Path) -> Iterator[dict[str, TensorEntry]]:
    """The headers of a model's weight files, each cut down to the tensors that the index places there."""
    names = weight_files(path)
    index = path / INDEX_FILE
    if names == (SINGLE_FILE,):
        yield read_header(path / SINGLE_FILE)
        return
    weight_map = read_json(index, LayoutError)["weight_map"]
    for shard in names:
        if not lies_there(path / shard):
            raise CheckpointError(f"names {shard}, which is missing", where=index, mend="fetch the model again")
        entries = read_header(path / shard)
        absent = [name for name, file in weight_map.items() if file == shard and name not in entries]
        if absent:
            raise CheckpointError(f"lacks {absent[0]}, which the index says it holds", where=path / shard)
        yield {name: entry for name, entry in entries.items() if weight_map.get(name) == shard}


def _open_bundle(path: Path) -> Checkpoint:
    files = layer_files(path)
    entries = {}
    for index in bundle_layers(path):
        for name, entry in read_header(files[index]).items():
            match = _STORED_LAYER_PREFIX.match(name)
            if match and int(match[1]) != index:
                raise CheckpointError(f"holds {name}, a tensor of another layer", where=files[index])
            entries[layer_prefix(index) + (name[match.end() :] if match else name)] = entry
    return Checkpoint(path, "bundle", entries)
