"""A PEFT LoRA adapter on disk: what it says, whether we can merge it, and which tensor goes where.

PEFT drops tensors that match nothing without a word, and merges a random delta where one is missing. Here every tensor
is accounted for before anything is written. Trainers that know a model's layers under several names save each tensor
once a name; such aliases count as one tensor if they are equal bit for bit.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mistral_prune_lora.checkpoints.adapter_config import ELSEWHERE, AdapterConfig
from mistral_prune_lora.checkpoints.tensor_names import HEAD_MODULE, LAYER_PREFIX, LAYERS, layer_prefix
from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.dtype_names import FLOATS
from mistral_prune_lora.storage.plain_file import lies_there
from mistral_prune_lora.storage.safetensors_file import TensorEntry, read_header

WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?P<role>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_LAYER = re.compile(r"(?:model\.){0,2}(?:_canonical_)?layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_HEAD = re.compile(r"(?:model\.){0,2}lm_head")


@dataclass(frozen=True)
class Update:
    """What one adapter does to one weight.

    Attributes:
        module: canonical module name, e.g. "model.layers.21.self_attn.q_proj".
        a, b: where lora_A (r, in) and lora_B (out, r) lie.
        magnitude: where DoRA's magnitude (out,) lies; None for LoRA.
        alpha: of this module.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    module: str
    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None
    alpha: float
    scaling: float

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Its tensors."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that it is for: (out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def layer(self) -> int | None:
        """The decoder layer that it is for; None for the head."""
        match = LAYER_PREFIX.match(self.module)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Adapter:
    """An adapter directory that was read and found mergeable.

    Attributes:
        path: the directory, absolute.
        config: its adapter_config.json.
        updates: by module name, under original layer indices.
        aliases: tensors that repeat another one under another name.
        compact: where the adapter's own layer i is the i-th kept layer: those layers; None for original indices.
    """

    path: Path
    config: AdapterConfig
    updates: Mapping[str, Update]
    aliases: int = 0
    compact: tuple[int, ...] | None = None

    @property
    def base_model(self) -> str | None:
        """What the adapter was trained on, as it names it."""
        return self.config.get("base_model_name_or_path")

    def targets(self, module: str) -> bool:
        """Whether its configuration speaks of a module, by PEFT's rules for target_modules and layers_to_transform."""
        return self.config.targets(self.own_name(module))

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers that it has tensors for, ascending."""
        return tuple(sorted({u.layer for u in self.updates.values() if u.layer is not None}))

    @cached_property
    def weights_sha256(self) -> str:
        """The sha256 of its weights file, which tells one adapter from another."""
        return file_sha256(self.path / WEIGHTS_FILE)

    def own_name(self, module: str) -> str:
        """A module's name as the adapter's own configuration counts layers."""
        match = LAYER_PREFIX.match(module)
        if self.compact is None or not match:
            return module
        return layer_prefix(self.compact.index(int(match[1]))) + module[match.end() :]


def open_adapter(path: str | Path) -> Adapter:
    """Read an adapter's configuration and header.

    Raises:
        AdapterError: not an adapter, pickled weights, a kind or setting that is not merged here, a tensor that belongs
            to no LoRA module of a decoder layer or the head, two different tensors for one, a missing half, a rank
            that is not the configured one.
        CheckpointError: the weights file is malformed.
    """
    path = Path(os.path.abspath(path))
    config = AdapterConfig.read(path)
    modules: dict[str, dict[str, TensorEntry]] = {}
    aliases = 0
    for key, entry in _read_entries(path).items():
        module, role = _place(key, path)
        roles = modules.setdefault(module, {})
        if role in roles:
            _check_alias(roles[role], entry)
            aliases += 1
        else:
            roles[role] = entry
    if not modules:
        raise AdapterError("there are no tensors", where=path / WEIGHTS_FILE, mend="train or copy the adapter again")
    updates = {name: _update(name, roles, config, path) for name, roles in modules.items()}
    return Adapter(path, config, updates, aliases)


def check_values(updates: Collection[Update]) -> None:
    """Raise an AdapterError if a tensor of the updates holds NaN or infinity."""
    import torch

    for update in updates:
        for entry in update.entries:
            if not torch.isfinite(entry.read()).all():
                raise AdapterError(
                    f"tensor {entry.stored_name} holds NaN or infinity", where=entry.file, mend="train it again"
                )


def _read_entries(path: Path) -> dict[str, TensorEntry]:
    if lies_there(path / WEIGHTS_FILE):
        return read_header(path / WEIGHTS_FILE)
    pickled = path / "adapter_model.bin"
    if pickled.is_file():
        raise AdapterError(
            "the adapter's weights are pickled, which can run code when loaded",
            where=pickled,
            mend="load it with PEFT where you trust it and save it again; save_pretrained writes safetensors",
        )
    raise AdapterError(f"there is no {WEIGHTS_FILE}", where=path, mend="train or copy the adapter again")


def _place(key: str, path: Path) -> tuple[str, str]:
    """(canonical module name, role) of an adapter tensor: "model.layers.21.mlp.up_proj", "lora_A"."""
    match = _KEY.fullmatch(key)
    if not match:
        raise AdapterError(
            f"tensor {key} belongs to no LoRA module that is merged here", where=path / WEIGHTS_FILE, mend=ELSEWHERE
        )
    if layer := _LAYER.fullmatch(match["module"]):
        return f"{LAYERS}{layer['layer']}.{layer['rest']}", match["role"]
    if _HEAD.fullmatch(match["module"]):
        return HEAD_MODULE, match["role"]
    raise AdapterError(
        f"has an update for {match['module']}, which is neither a decoder layer nor the head of a language model",
        where=path / WEIGHTS_FILE,
        mend="use an adapter that was trained for this model",
    )


def _check_alias(first: TensorEntry, second: TensorEntry) -> None:
    """Raise an AdapterError unless two tensors that stand for one are equal, bit for bit."""
    import torch

    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    if not same or not torch.equal(*(entry.read().flatten().view(torch.uint8) for entry in (first, second))):
        raise AdapterError(
            f"tensors {first.stored_name} and {second.stored_name} are of one module, and differ",
            where=first.file,
            mend="save the adapter again from the model that was trained",
        )


def _update(module: str, roles: Mapping[str, TensorEntry], config: AdapterConfig, path: Path) -> Update:
    where, dora = path / WEIGHTS_FILE, config.use_dora
    wanted = ("lora_A", "lora_B", *(("lora_magnitude_vector",) if dora else ()))
    missing = [role for role in wanted if role not in roles]
    if missing:
        raise AdapterError(f"{module} has no {missing[0]}", where=where, mend="train or copy the adapter again")
    if not dora and "lora_magnitude_vector" in roles:
        raise AdapterError(f"{module} has a DoRA magnitude, but use_dora is off", where=where)
    a, b, magnitude = roles["lora_A"], roles["lora_B"], roles.get("lora_magnitude_vector")
    rank, alpha = config.rank(module), config.alpha(module)
    strange = [entry for entry in roles.values() if entry.dtype not in ("F64", *FLOATS)]
    if strange:
        raise AdapterError(f"{module} has factors of dtype {strange[0].dtype}", where=where, mend=ELSEWHERE)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise AdapterError(f"{module}: lora_A {a.shape} and lora_B {b.shape} do not fit each other", where=where)
    if a.shape[0] != rank:
        raise AdapterError(
            f"{module} has rank {a.shape[0]}, but the configuration says {rank}",
            where=where,
            mend="use the pair PEFT wrote",
        )
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise AdapterError(f"{module}: the magnitude {magnitude.shape} does not fit lora_B {b.shape}", where=where)
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Update(module, a, b, magnitude, alpha, scaling)
