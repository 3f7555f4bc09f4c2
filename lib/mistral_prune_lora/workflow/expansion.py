"""Experiments that are said by what they differ in: `like` another one, or a `sweep` over values.

Both are gone once they are expanded: the schema, the rules and the results know whole experiments only.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mistral_prune_lora.workflow.configuration import ConfigError

MOST_IN_A_SWEEP = 1000
_EXCLUDING = ("layers", "pruned")  # an experiment has one of them
_LONGEST_WORD = 32  # characters of a value that stands in a name
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


class SweepMember(NamedTuple):
    """Where an experiment of a sweep comes from: the experiment with the sweep, and the values by dotted key."""

    base: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class Expansion:
    """A configuration without `like` and `sweep`.

    Attributes:
        config: a copy of what was read, with whole experiments in the order that they were written in.
        sweeps: the origin of each experiment that a sweep has made, by its name.
    """

    config: dict
    sweeps: Mapping[str, SweepMember] = field(default_factory=dict)


def expand_experiments(config: dict) -> Expansion:
    """Expand `like` and `sweep` in a configuration as it was read, before its schema is asked.

    `like: NAME` takes NAME's settings, with this experiment's own over them: mappings are merged, anything else is
    replaced whole, and of `layers` and `pruned` an experiment's own one takes the place of the other. `sweep: {KEY:
    [VALUES]}` stands for one experiment for each choice of values, NAME-key1value1-key2value2; it takes the place of
    the experiment itself. What is of another shape is left to the schema.

    Args:
        config: it is not changed.

    Raises:
        ConfigError: `like` names nothing, itself in a circle or an experiment with a sweep; a sweep is not made of
            lists, or two experiments would have one name. All such mistakes, a line each.
    """
    experiments = config.get("experiments") if isinstance(config, Mapping) else None
    if not isinstance(experiments, Mapping):
        return Expansion(config)
    faults = [fault for name in experiments for fault in _like_faults(experiments, name)]
    if faults:
        raise ConfigError(faults)
    whole: dict[str, Any] = {}
    sweeps: dict[str, SweepMember] = {}
    made: list[str] = []
    for name in experiments:
        experiment = _resolved(experiments, name)
        if not isinstance(experiment, dict) or "sweep" not in experiment:
            whole[name] = experiment
            made.append(name)
            continue
        sweep = experiment.pop("sweep")
        if found := list(_sweep_faults(name, experiment, sweep)):
            faults += found
            continue
        for member, values in _members(name, sweep):
            made.append(member)
            whole[member] = _with_values(experiment, values)
            sweeps[member] = SweepMember(name, values)
    faults += _doubled(made, sweeps)
    if faults:
        raise ConfigError(faults)
    return Expansion({**copy.deepcopy(dict(config)), "experiments": whole}, sweeps)


def _like_faults(experiments: Mapping, name: str) -> Iterator[str]:
    """What is wrong with an experiment's own `like`; a circle is told once, by the first experiment in it."""
    if not isinstance(experiments[name], Mapping) or "like" not in experiments[name]:
        return
    path, base = f"experiments.{name}.like", experiments[name]["like"]
    if not isinstance(base, str) or base not in experiments:
        yield f"{path}: {base!r} is not one of experiments: {', '.join(sorted(map(str, experiments)))}"
        return
    if isinstance(experiments[base], Mapping) and "sweep" in experiments[base] and base != name:
        yield (
            f"{path}: {base!r} has a sweep, so it is many experiments; move what both share into one without a sweep,"
            " and let both be like that"
        )
    chain = [name]
    while isinstance(experiments[base], Mapping) and base not in chain:
        chain.append(base)
        following = experiments[base].get("like")
        if not isinstance(following, str) or following not in experiments:
            return
        base = following
    if base == name and name == next(key for key in experiments if key in chain):
        yield f"{path}: goes round in a circle: {', '.join([*chain, name])}"


def _resolved(experiments: Mapping, name: str) -> Any:
    """An experiment over all that it is like; a copy."""
    own = copy.deepcopy(experiments[name])
    if not isinstance(own, dict) or "like" not in own:
        return own
    base = _resolved(experiments, own.pop("like"))
    if not isinstance(base, dict):
        return own  # the schema says what is wrong with the other one
    for key, other in (_EXCLUDING, _EXCLUDING[::-1]):
        if key in own:
            base.pop(other, None)
    both = [layers for layers in (own.get("layers"), base.get("layers")) if isinstance(layers, Mapping)]
    if len({"choice" in layers for layers in both}) > 1:
        del base["layers"]  # chosen, or named: one takes the place of the other
    return _merged(base, own)


def _merged(base: dict, own: Mapping) -> dict:
    """One mapping over another; mappings in both are merged in turn."""
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = _merged(base[key], value) if both else value
    return base


def _sweep_faults(name: str, experiment: Mapping, sweep: object) -> Iterator[str]:
    path = f"experiments.{name}.sweep"
    if not isinstance(sweep, Mapping) or not sweep:
        yield f"{path}: is not a mapping of dotted keys to lists, such as distill.seed: [0, 1, 2]"
        return
    sound, keys = True, set(map(str, sweep))
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            yield f"{path}.{key}: {values!r} is not a list of at least one value"
            sound = False
            continue
        inner: object = experiment
        *outer, _ = str(key).split(".")
        for depth, part in enumerate(outer, 1):
            if (above := ".".join(outer[:depth])) in keys:
                yield f"{path}.{key}: {above} is swept too, which holds this key"
                break
            inner = inner.get(part, {}) if isinstance(inner, Mapping) else inner
            if not isinstance(inner, Mapping):
                yield f"{path}.{key}: {above} is {inner!r} here, which holds no keys"
                break
    if sound and (count := math.prod(map(len, sweep.values()))) > MOST_IN_A_SWEEP:
        yield f"{path}: stands for {count} experiments, and {MOST_IN_A_SWEEP} are the most; give fewer values"


def _members(name: str, sweep: Mapping[Any, list]) -> Iterator[tuple[str, dict[str, object]]]:
    """(name, values by dotted key) for each choice of values; the last key changes first."""
    keys = [str(key) for key in sweep]
    shown = _short_keys(keys)
    words = [[_word(value, place) for place, value in enumerate(values)] for values in sweep.values()]
    for places in itertools.product(*(range(len(values)) for values in sweep.values())):
        parts = [f"{key}{told[place]}" for key, told, place in zip(shown, words, places, strict=True)]
        chosen = {key: values[place] for key, values, place in zip(keys, sweep.values(), places, strict=True)}
        yield "-".join([name, *parts]), chosen


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The last components of dotted keys, as many as tell each key from the others, fit for a name."""
    shown = []
    for key in keys:
        parts = key.split(".")
        counts = range(1, len(parts) + 1)
        rivals = [other.split(".") for other in keys if other != key]
        count = next((n for n in counts if all(parts[-n:] != rival[-n:] for rival in rivals)), len(parts))
        shown.append(re.sub(r"[^A-Za-z0-9_]", "_", "_".join(parts[-count:])))
    return shown


def _word(value: object, place: int) -> str:
    """A value as a part of a name; of what makes no word, such as a list or a path, its place among the values."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, (int, float, str)):
        return str(place)
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if len(text) > _LONGEST_WORD or not _WORD.fullmatch(text.removeprefix("-")):
        return str(place)
    return text.replace(".", "p").replace("+", "")


def _with_values(experiment: Mapping, values: Mapping[str, object]) -> dict:
    made = copy.deepcopy(dict(experiment))
    for key, value in values.items():
        *outer, last = key.split(".")
        inner = made
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = copy.deepcopy(value)
    return made


def _doubled(made: Sequence[str], sweeps: Mapping[str, SweepMember]) -> Iterator[str]:
    """A line for each name that stands for several experiments, one of which a sweep has made."""
    for name, times in Counter(made).items():
        if times > 1:
            yield (
                f"experiments.{sweeps[name].base}.sweep: {times} experiments would be called {name!r}; leave out values"
                " that stand twice, or rename the other experiment"
            )
