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
from pathlib import Path

import torch

from mistral_prune_lora.checkpoint import LAYER_PREFIX
from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.json_file import read_json
from mistral_prune_lora.safetensors_file import TensorEntry, read_header

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?P<role>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_LAYER = re.compile(r"(?:model\.){0,2}(?:_canonical_)?layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_HEAD = re.compile(r"(?:model\.){0,2}lm_head")
_ELSEWHERE = "merge it with PEFT's merge_and_unload, and prune the result"
# What changes the arithmetic or the set of tensors; each is refused by name unless it is off.
_UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "target_modules_to_tie",
)
# Initialisations that change the base's weights each time PEFT loads the adapter.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Update:
    """What one adapter does to one weight.

    Attributes:
        module: canonical module name, e.g. "model.layers.21.self_attn.q_proj".
        a, b: where lora_A (r, in) and lora_B (out, r) lie.
        magnitude: where DoRA's magnitude (out,) lies; None for LoRA.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    module: str
    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None
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
        config: the parsed adapter_config.json.
        updates: by module name, under original layer indices.
        aliases: tensors that repeat another one under another name.
        compact: where the adapter's own layer i is the i-th kept layer: those layers; None for original indices.
    """

    path: Path
    config: dict
    updates: Mapping[str, Update]
    aliases: int = 0
    compact: tuple[int, ...] | None = None

    @property
    def base_model(self) -> str | None:
        """What the adapter was trained on, as it names it."""
        return self.config.get("base_model_name_or_path")

    def targets(self, module: str) -> bool:
        """Whether its configuration speaks of a module, by PEFT's rules for target_modules and layers_to_transform."""
        return _targets(self.config, self.own_name(module))

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers that it has tensors for, ascending."""
        return tuple(sorted({u.layer for u in self.updates.values() if u.layer is not None}))

    def own_name(self, module: str) -> str:
        """A module's name as the adapter's own configuration counts layers."""
        match = LAYER_PREFIX.match(module)
        if self.compact is None or not match:
            return module
        return f"model.layers.{self.compact.index(int(match[1]))}.{module[match.end() :]}"


def open_adapter(path: str | Path) -> Adapter:
    """Read an adapter's configuration and header.

    Raises:
        AdapterError: not an adapter, pickled weights, a kind or setting that is not merged here, a tensor that belongs
            to no LoRA module of a decoder layer or the head, two different tensors for one, a missing half, a rank
            that is not the configured one.
        CheckpointError: the weights file is malformed.
    """
    path = Path(os.path.abspath(path))
    config = _read_config(path)
    _refuse_unsupported(config, path)
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
    for update in updates:
        for entry in update.entries:
            if not torch.isfinite(entry.read()).all():
                raise AdapterError(
                    f"tensor {entry.stored_name} holds NaN or infinity", where=entry.file, mend="train it again"
                )


def _read_config(path: Path) -> dict:
    if not (path / CONFIG_FILE).exists():
        raise AdapterError(
            f"there is no {CONFIG_FILE}", where=path, mend="give the directory that PEFT's save_pretrained wrote"
        )
    return read_json(path / CONFIG_FILE, AdapterError)


def _refuse_unsupported(config: Mapping, path: Path) -> None:
    where = path / CONFIG_FILE
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"is of type {kind}; only LORA (with rsLoRA and DoRA) is merged here", where=where, mend=_ELSEWHERE
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            raise AdapterError(f"sets {key}, which is not merged here", where=where, mend=_ELSEWHERE)
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"trains biases (bias={config['bias']!r}), which are not merged here", where=where, mend=_ELSEWHERE
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"was initialised by {start}, which also changes the base model, so it is no plain LoRA",
            where=where,
            mend="save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key)
        try:
            good = re.compile(names) if isinstance(names, str) else all(isinstance(name, str) for name in names or ())
        except (TypeError, re.error):
            good = False
        if not good or (key == "target_modules" and not names):
            raise AdapterError(
                f"{key} is {names!r}, neither names nor a regular expression",
                where=where,
                mend="use the adapter_config.json that PEFT wrote",
            )


def _read_entries(path: Path) -> dict[str, TensorEntry]:
    if (path / WEIGHTS_FILE).is_file():
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
            f"tensor {key} belongs to no LoRA module that is merged here", where=path / WEIGHTS_FILE, mend=_ELSEWHERE
        )
    if layer := _LAYER.fullmatch(match["module"]):
        return f"model.layers.{layer['layer']}.{layer['rest']}", match["role"]
    if _HEAD.fullmatch(match["module"]):
        return "lm_head", match["role"]
    raise AdapterError(
        f"has an update for {match['module']}, which is neither a decoder layer nor the head of a language model",
        where=path / WEIGHTS_FILE,
        mend="use an adapter that was trained for this model",
    )


def _check_alias(first: TensorEntry, second: TensorEntry) -> None:
    """Raise an AdapterError unless two tensors that stand for one are equal, bit for bit."""
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    if not same or not torch.equal(*(entry.read().flatten().view(torch.uint8) for entry in (first, second))):
        raise AdapterError(
            f"tensors {first.stored_name} and {second.stored_name} are of one module, and differ",
            where=first.file,
            mend="save the adapter again from the model that was trained",
        )


def _update(module: str, roles: Mapping[str, TensorEntry], config: Mapping, path: Path) -> Update:
    where = path / WEIGHTS_FILE
    dora = bool(config.get("use_dora"))
    wanted = ("lora_A", "lora_B", *(("lora_magnitude_vector",) if dora else ()))
    missing = [role for role in wanted if role not in roles]
    if missing:
        raise AdapterError(f"{module} has no {missing[0]}", where=where, mend="train or copy the adapter again")
    if not dora and "lora_magnitude_vector" in roles:
        raise AdapterError(f"{module} has a DoRA magnitude, but use_dora is off", where=where)
    a, b, magnitude = roles["lora_A"], roles["lora_B"], roles.get("lora_magnitude_vector")
    rank = _setting(config, "rank_pattern", "r", module, path)
    alpha = _setting(config, "alpha_pattern", "lora_alpha", module, path)
    strange = [entry for entry in roles.values() if entry.dtype not in _FLOATS]
    if strange:
        raise AdapterError(f"{module} has factors of dtype {strange[0].dtype}", where=where, mend=_ELSEWHERE)
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
    return Update(module, a, b, magnitude, scaling)


def _setting(config: Mapping, patterns: str, default: str, module: str, path: Path) -> float:
    """A module's rank or alpha: of the first pattern that ends its name, as PEFT resolves it, or else the default."""
    value = config.get(default)
    try:
        for pattern, special in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = special
                break
    except (AttributeError, re.error) as error:
        raise AdapterError(f"has a {patterns} that cannot be used: {error}", where=path / CONFIG_FILE) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(
            f"{default} of {module} is {value!r}, not a number",
            where=path / CONFIG_FILE,
            mend="use the adapter_config.json that was saved with these tensors",
        )
    return value


def _targets(config: Mapping, module: str) -> bool:
    excluded, wanted = config.get("exclude_modules"), config["target_modules"]
    if excluded and _named(excluded, module):
        return False
    if wanted == "all-linear":
        return LAYER_PREFIX.match(module) is not None
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    if module in wanted:
        return True
    if not _named(wanted, module):
        return False
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    index = _layer_index(config.get("layers_pattern"), module)
    return index is not None and index in ([chosen] if isinstance(chosen, int) else chosen)


def _named(names: str | Collection[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _layer_index(patterns: str | list[str] | None, module: str) -> int | None:
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
        return int(match["idx"]) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module)
        if match:
            return int(match["idx"])
    return None
