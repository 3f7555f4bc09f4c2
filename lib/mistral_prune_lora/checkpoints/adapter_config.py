"""What an adapter_config.json says: which modules it speaks of, with which rank and alpha, by PEFT's own rules.

Patterns come from a file that anybody may have written, and a regular expression can take for ever. They are matched by
the `regex` library, which can be given a time limit; all patterns of an adapter share one.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import regex

from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.storage.json_file import read_json

CONFIG_FILE = "adapter_config.json"
ELSEWHERE = "merge it with PEFT's merge_and_unload, and prune the result"
MATCHING_SECONDS = 10.0  # for one adapter; PEFT's own configurations take milliseconds
_MOST_NAMES, _LONGEST_NAME = 20_000, 1000  # a name for every module of a very large model
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


class AdapterConfig:
    """The configuration of an adapter that can be merged here.

    Attributes:
        content: the parsed file.
        where: the file.
    """

    def __init__(self, content: Mapping, where: Path) -> None:
        """Check it.

        Raises:
            AdapterError: it is for another kind of adapter, sets what is not merged here, or has names or patterns that
                cannot be used.
        """
        self.content, self.where = content, where
        self._left = MATCHING_SECONDS
        self._refuse_unsupported()
        self._check_names()

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """The configuration of an adapter directory; AdapterError if it is missing or cannot be used."""
        if not (folder / CONFIG_FILE).exists():
            raise AdapterError(
                f"there is no {CONFIG_FILE}", where=folder, mend="give the directory that PEFT's save_pretrained wrote"
            )
        return cls(read_json(folder / CONFIG_FILE, AdapterError), folder / CONFIG_FILE)

    def get(self, key: str, default=None):
        """A setting as it stands in the file."""
        return self.content.get(key, default)

    @property
    def use_dora(self) -> bool:
        """Whether there are DoRA magnitudes."""
        return bool(self.get("use_dora"))

    def rank(self, module: str) -> float:
        """The rank of a module; AdapterError if it is no number."""
        return self._setting("rank_pattern", "r", module)

    def alpha(self, module: str) -> float:
        """The alpha of a module; AdapterError if it is no number."""
        return self._setting("alpha_pattern", "lora_alpha", module)

    def targets(self, module: str) -> bool:
        """Whether it speaks of a module, by PEFT's rules for target_modules, exclude_modules and layers_to_transform.

        Raises:
            AdapterError: the patterns take too long.
        """
        excluded, wanted = self.get("exclude_modules"), self.content["target_modules"]
        if excluded and self._named(excluded, module):
            return False
        if wanted == "all-linear":
            return LAYER_PREFIX.match(module) is not None
        if isinstance(wanted, str):
            return self._match(regex.fullmatch, wanted, module) is not None
        if module in wanted:
            return True
        if not self._named(wanted, module):
            return False
        chosen = self.get("layers_to_transform")
        if chosen is None or chosen == []:
            return True
        index = self._layer_index(module)
        return index is not None and index in ([chosen] if isinstance(chosen, int) else chosen)

    def _refuse_unsupported(self) -> None:
        kind = self.get("peft_type")
        if kind != "LORA":
            raise self._fault(f"is of type {kind}; only LORA (with rsLoRA and DoRA) is merged here", ELSEWHERE)
        for key in _UNSUPPORTED:
            if self.get(key):
                raise self._fault(f"sets {key}, which is not merged here", ELSEWHERE)
        if self.get("bias", "none") != "none":
            raise self._fault(f"trains biases (bias={self.get('bias')!r}), which are not merged here", ELSEWHERE)
        start = str(self.get("init_lora_weights")).lower()
        if start.startswith(_CHANGES_BASE):
            raise self._fault(
                f"was initialised by {start}, which also changes the base model, so it is no plain LoRA",
                "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )

    def _check_names(self) -> None:
        """Raise unless every field of names and patterns has the shape that PEFT writes, and a size it might have."""
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            names = self.get(key)
            listed = [names] if isinstance(names, str) else names or []
            patterns = key == "layers_pattern" or isinstance(names, str)
            if not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
                raise self._no_names(key)
            if not self._usable(listed, patterns=patterns) or (key == "target_modules" and not names):
                raise self._no_names(key)
        for key in ("rank_pattern", "alpha_pattern"):
            table = self.get(key) or {}
            if not isinstance(table, dict) or not self._usable(list(table), patterns=True):
                raise self._fault(f"has a {key} that cannot be used")
        layers = self.get("layers_to_transform")
        listed = [] if layers is None else layers if isinstance(layers, list) else [layers]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
            raise self._fault("layers_to_transform is not a list of layer numbers")

    def _usable(self, names: Collection[str], *, patterns: bool) -> bool:
        if len(names) > _MOST_NAMES:
            raise self._fault(f"has {len(names)} names or patterns; more than {_MOST_NAMES} are not read here")
        longest = max(map(len, names), default=0)
        if longest > _LONGEST_NAME:
            raise self._fault(f"has a name or pattern of {longest} characters; at most {_LONGEST_NAME} are read here")
        try:
            return not patterns or all(re.compile(name) and regex.compile(name) for name in names)
        except (re.error, regex.error, RecursionError, OverflowError):
            return False

    def _no_names(self, key: str) -> AdapterError:
        return self._fault(f"{key} is {_short(self.get(key))}, neither names nor a regular expression")

    def _fault(self, what: str, mend: str = "use the adapter_config.json that PEFT wrote") -> AdapterError:
        return AdapterError(what, where=self.where, mend=mend)

    def _setting(self, patterns: str, default: str, module: str) -> float:
        """Of the first pattern that ends a module's name, as PEFT resolves it, or else the default."""
        value = self.get(default)
        for pattern, special in (self.get(patterns) or {}).items():
            if self._match(regex.match, rf"(.*\.)?({pattern})$", module):
                value = special
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fault(
                f"{default} of {module} is {_short(value)}, not a number",
                "use the adapter_config.json that was saved with these tensors",
            )
        return value

    def _named(self, names: str | Collection[str], module: str) -> bool:
        if isinstance(names, str):
            return self._match(regex.fullmatch, names, module) is not None
        return module in names or any(module.endswith(f".{name}") for name in names)

    def _layer_index(self, module: str) -> int | None:
        patterns = self.get("layers_pattern")
        if not patterns:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
            return int(match["idx"]) if match else None
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = self._match(regex.match, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module)
            if match:
                return int(match["idx"])
        return None

    def _match(self, how: Callable, pattern: str, module: str):
        """A match, out of the time that this adapter has left."""
        began = time.monotonic()
        try:
            return how(pattern, module, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise self._fault(f"has patterns that take more than {MATCHING_SECONDS:g} s to match") from None
        except regex.error as error:
            raise self._fault(f"has a pattern that cannot be used: {error}") from None
        finally:
            self._left -= time.monotonic() - began


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
