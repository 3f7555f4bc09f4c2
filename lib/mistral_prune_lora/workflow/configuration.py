"""The workflow's configuration: checked as a whole, every mistake reported at once with the path of its key.

Snakemake's own `validate` stops at the first mistake and knows nothing of references between sections.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

from mistral_prune_lora.checkpoints.directories import bundle_layers, is_bundle_dir
from mistral_prune_lora.checkpoints.manifest import read_layout
from mistral_prune_lora.choosing.settings import ChoiceSettings
from mistral_prune_lora.closed_form.places import correction_places
from mistral_prune_lora.errors import LayoutError, PipelineError, printable, shortened
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES, Layout
from mistral_prune_lora.workflow.chosen import Chosen, choice_file
from mistral_prune_lora.workflow.restoring import CLOSED_FORM, TRAIN, restore_faults, undone_part

_LONGEST_LINE = 500
# In C where libyaml was there when PyYAML was built: a hundred experiments take a second less.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ConfigError(PipelineError):
    """The configuration has mistakes; its text lists all of them, a line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(f"the configuration has {len(faults)} mistake{'s' * (len(faults) > 1)}")
        self._faults = tuple(faults)

    def __str__(self) -> str:
        listed = "".join(f"\n  {shortened(printable(fault), _LONGEST_LINE)}" for fault in self._faults)
        return f"{self.what}:{listed}\n"


def check_files(paths: Iterable[str | Path]) -> None:
    """Raise a ConfigError if keys stand twice in one mapping of a YAML file, of which its readers would take the last.

    What is no YAML at all is the reader's to say.
    """
    faults = []
    for path in dict.fromkeys(map(str, paths)):
        try:
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_LOADER)
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        faults += [f"{path}: line {line}: the key {key!r} stands twice" for key, line in _repeated_keys(root)]
    if faults:
        raise ConfigError(faults)


def with_yaml_values(config: Mapping, overrides: Mapping) -> dict:
    """A configuration whose top-level values from the command line are what YAML would make of them.

    Snakemake hands on `--config keep_activations=false` as the word "false".

    Args:
        config: it is not changed.
        overrides: what `--config` gave; where a configuration holds another value, that one stays.
    """
    words = {key: value for key, value in overrides.items() if isinstance(value, str) and config.get(key) == value}
    return {**config, **{key: yaml.safe_load(value) for key, value in words.items()}}


def _repeated_keys(root: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """The keys that stand twice, with the line of the second; an anchor's content is looked at once."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
            continue
        keys = set()
        for key, value in node.value:
            left.append(value)
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                yield key.value, key.start_mark.line + 1
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else None)


def check_config(config: dict, schema_path: str | Path) -> dict:
    """Check a configuration against its JSON schema and its own cross references, and fill in the defaults.

    Of files, only what tells the layers of a given pruned model is read; the rest is `checks.check_inputs`'s.

    Args:
        config: as read from YAML; defaults are written into it.
        schema_path: a JSON schema in YAML (draft 2020-12).

    Returns:
        The same dict.

    Raises:
        ConfigError: one or more mistakes, a line each: the key's path, what is wrong there, what is allowed.
    """
    schema = yaml.safe_load(Path(schema_path).read_text(encoding="utf-8"))
    faults = sorted({fault for error in _WithDefaults(schema).iter_errors(config) for fault in _lines(error)})
    # References can only be followed in a configuration whose shape is right.
    faults = faults or list(_broken_references(config))
    if faults:
        raise ConfigError(faults)
    return config


def experiment_layout(config: Mapping, experiment: str) -> Layout:
    """The layers of A, B and C in one experiment: from its `layers` or what was chosen, or from its given pruned model.

    Of that, its manifest tells, and its bundles where the manifest leaves open which dropped layers are B's and C's.

    Raises:
        LayoutError: the layers contradict each other or the model; the given model has no manifest, or nothing tells
            B from C; the layers are still to be chosen.
    """
    settings = config["experiments"][experiment]
    if "pruned" in settings:
        given = settings["pruned"]
        layout = read_layout(given["A"])
        if layout is None:
            raise LayoutError(
                "there is no manifest.json", where=given["A"], mend="give the A directory that pruning wrote"
            )
        if layout.unassigned:
            folders = {part: Path(given["bundles"]) / part for part in "BC"}
            held = {part: bundle_layers(folder) for part, folder in folders.items() if is_bundle_dir(folder)}
            layout = layout.assigned(held, where=given["bundles"])
            layout.layers_of("B")  # a job for no layers, for want of knowing them, would go unnoticed
        return layout
    layers = settings["layers"]
    if "choice" in layers:
        return Chosen.read(layers["choice"]).layout
    return Layout(config["models"][settings["model"]]["num_layers"], tuple(layers["B"]), tuple(layers["C"]))


def baseline_of(config: Mapping, experiment: str) -> str | None:
    """The experiment that another one's results are told beside: its own `baseline`, or else the configuration's.

    None without one, and for that experiment itself.
    """
    name = config["experiments"][experiment].get("baseline", config.get("baseline"))
    return None if name == experiment else name


def _set_defaults(validate_properties):
    def validate(validator, properties, instance, schema):
        if isinstance(instance, dict):
            for name, subschema in properties.items():
                if "default" in subschema:
                    # A copy: two experiments must not share one dict of defaults.
                    instance.setdefault(name, copy.deepcopy(subschema["default"]))
        yield from validate_properties(validator, properties, instance, schema)

    return validate


def _is_number(_, instance: object) -> bool:
    """A number that can be computed with: YAML also knows .nan and .inf, and every bound lets NaN pass."""
    return isinstance(instance, (int, float)) and not isinstance(instance, bool) and math.isfinite(instance)


def _is_integer(_, instance: object) -> bool:
    """A whole number that Python takes for one: 16.0 is none, whatever JSON says."""
    return isinstance(instance, int) and not isinstance(instance, bool)


_WithDefaults = validators.extend(
    Draft202012Validator,
    {"properties": _set_defaults(Draft202012Validator.VALIDATORS["properties"])},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many({"number": _is_number, "integer": _is_integer}),
)


def _lines(error: ValidationError) -> Iterator[str]:
    """One line for each mistake in a schema error; of alternatives, the mistakes in the one that fits best."""
    path = ".".join(str(key) for key in error.absolute_path) or "(top level)"
    schema = error.schema if isinstance(error.schema, Mapping) else {}
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = sorted(schema.get("properties", {}))
        for key in sorted(set(error.instance) - set(known), key=str):
            yield f"{path}.{key}".removeprefix("(top level).") + f": unknown key; known here: {', '.join(known)}"
    elif error.validator in ("oneOf", "anyOf") and schema.get("x-explain"):
        yield f"{path}: {schema['x-explain']}"
    else:
        yield f"{path}: {error.message}"


def _broken_references(config: Mapping) -> Iterator[str]:
    """A line for every name that refers to nothing and every layer choice that cannot be."""
    for name, experiment in config["experiments"].items():
        path = f"experiments.{name}"
        for key, section, values in (
            ("model", "models", [experiment["model"]]),
            ("perplexity.datasets", "datasets", experiment["perplexity"]["datasets"]),
            ("distill.dataset", "datasets", [experiment["distill"]["dataset"]]),
            ("distill.held_out.dataset", "datasets", [(experiment["distill"]["held_out"] or {}).get("dataset")]),
            ("importance.dataset", "datasets", [experiment["importance"]["dataset"]]),
            ("closed_form.datasets", "datasets", experiment["closed_form"]["datasets"]),
            ("choose.dataset", "datasets", [experiment["choose"]["dataset"]]),
        ):
            for value in values:
                if value is not None and value not in config[section]:
                    yield f"{path}.{key}: {value!r} is not one of {section}: {', '.join(sorted(config[section]))}"
        if experiment["model"] in config["models"]:
            yield from _choice_faults(config, experiment, path)
            # What is still to be chosen is asked about when it is there, see `chosen.waiting`.
            if (choice := choice_file(experiment)) is None or os.path.exists(choice):
                yield from _layer_faults(config, name, path)
    for path, place in (
        ("baseline", config),
        *((f"experiments.{n}.baseline", e) for n, e in config["experiments"].items()),
    ):
        if "baseline" in place and place["baseline"] not in config["experiments"]:
            names = ", ".join(sorted(config["experiments"]))
            yield f"{path}: {place['baseline']!r} is not one of experiments: {names}"


def _choice_faults(config: Mapping, experiment: Mapping, path: str) -> Iterator[str]:
    wanted = experiment["choose"]
    if wanted["dataset"] is not None:
        try:
            ChoiceSettings.of(wanted).check(config["models"][experiment["model"]]["num_layers"])
        except PipelineError as error:
            yield f"{path}.choose: {error}"


def _layer_faults(config: Mapping, name: str, path: str) -> Iterator[str]:
    experiment = config["experiments"][name]
    given = experiment.get("pruned")
    if given and not os.path.isdir(given["A"]):
        yield f"{path}.pruned.A: {missing_text(given['A'], 'give the A directory that pruning wrote')}"
        return
    try:
        layout = experiment_layout(config, name)
    except PipelineError as error:
        yield f"{path}.{'pruned' if given else 'layers'}: {error}"
        return
    total = config["models"][experiment["model"]]["num_layers"]
    if layout.num_layers != total:
        where = "pruned: the manifest speaks of" if given else "layers.choice: was made for a model of"
        yield f"{path}.{where} {layout.num_layers} layers, the model has {total}"
    trained = trained_parts(experiment, layout)
    if experiment["baselines"]:
        trained = [part for part in "ABC" if layout.layers_of(part)]
        for stage in (name.removeprefix("joint-") for name in experiment["baselines"] if name.startswith("joint-")):
            if empty := [part for part in PARTS_OF_STAGE[stage] if not layout.layers_of(part)]:
                yield f"{path}.baselines: joint-{stage} trains {' and '.join(empty)} too, which have no layers"
    if trained and experiment["distill"]["dataset"] is None:
        yield f"{path}.distill.dataset: needed to train the adapters {', '.join(trained)}"
    if trained:
        yield from _training_faults(config, experiment["distill"], layout, path, trained)
    yield from _closed_form_faults(experiment, layout, path)
    yield from restore_faults(experiment, layout, path)
    if experiment["adapter_indices"] == "compact" and "A" in (*trained, *closed_form_parts(experiment, layout)):
        yield f"{path}.adapter_indices: A's adapter is made here, under original indices; compact is for a given one"


def _training_faults(
    config: Mapping, distill: Mapping, layout: Layout, path: str, trained: Sequence[str]
) -> Iterator[str]:
    """A line for each setting of a training that contradicts another, or the layers."""
    held = distill["held_out"]
    if held and held["dataset"] is None and distill["windows"] is None:
        yield f"{path}.distill.held_out.dataset: needed where distill.windows takes the whole text for training"
    if held and held["dataset"] is None and config["datasets"].get(distill["dataset"], {}).get("packing"):
        yield f"{path}.distill.held_out.dataset: needed where several examples are packed into a window"
    if distill["teacher_4bit"] and distill["share_teacher_states"]:
        yield f"{path}.distill.teacher_4bit: shared states are those of the teacher as it is"
    hidden = distill["loss"]["hidden"]
    if hidden and hidden["teacher_layer"] >= layout.num_layers:
        yield f"{path}.distill.loss.hidden.teacher_layer: the model has {layout.num_layers} layers"
    for part in trained:
        wanted, layers = distill["parts"][part]["adapt_layers"], layout.layers_of(part)
        active = [layer for p in "ABC"[: "ABC".index(part) + 1] for layer in layout.layers_of(p)]
        first = min(layers if wanted == "all" else wanted, default=0)
        if hidden and (hidden["student_layer"] not in active or hidden["student_layer"] < first):
            told = f"is none that {part}'s student runs at or behind its first adapted layer, {first}"
            yield f"{path}.distill.loss.hidden.student_layer: {hidden['student_layer']} {told}"
        if wanted != "all" and (foreign := sorted(set(wanted) - set(layers))):
            yield f"{path}.distill.parts.{part}.adapt_layers: {foreign} are not layers of {part}: {list(layers)}"


def _closed_form_faults(experiment: Mapping, layout: Layout, path: str) -> Iterator[str]:
    """A line for each setting of adapters in closed form that contradicts another, or the layers."""
    made, started = closed_form_parts(experiment, layout), started_parts(experiment, layout)
    wanted, distill = experiment["closed_form"], experiment["distill"]
    if not made and not started:
        return
    if not wanted["datasets"] and distill["dataset"] is None:
        yield f"{path}.closed_form.datasets: needed for adapters in closed form, of {', '.join([*made, *started])}"
    if wanted["ridge"] is None and not wanted["held_out"]:
        yield f"{path}.closed_form.held_out: needed to choose the ridge on, unless closed_form.ridge is given"
    if started and distill["lora"]["use_dora"]:
        yield f"{path}.distill.start: with DoRA, two adapters of one weight do not add up"
    for part in (*made, *started):
        stage = {"A": "A", "B": "AB", "C": "FULL"}[part]
        try:
            places = correction_places(
                layout.active(stage), layout.layers_of(part), layout.num_layers, wanted["layers_behind"]
            )
        except LayoutError as error:
            yield f"{path}.adapters.{part}: {error}"
            continue
        adapted = distill["parts"][part]["adapt_layers"]
        left = [place.layer for place in places if adapted != "all" and place.layer not in adapted]
        if part in started and left:
            yield f"{path}.distill.parts.{part}.adapt_layers: leaves out layers {left}, which distill.start changes"


def missing_text(path: str | Path, mend: str) -> str:
    """What is said of a path that leads nowhere: itself, how far it leads, and what to do."""
    whole = Path(os.path.abspath(path.replace("\0", "") if isinstance(path, str) else path))
    there = next(folder for folder in (whole, *whole.parents) if os.path.isdir(folder))
    return f"there is no {path}; of this path, {there} is there. {mend[0].upper()}{mend[1:]}."


def dense_dir(config: Mapping, model: str) -> str:
    """The directory of a dense model: its own if it is local, else where it is fetched to."""
    return config["models"][model].get("path", fetched_dir(model))


def fetched_dir(model: str) -> str:
    """Where a dense model is fetched to."""
    return f"resources/models/{model}"


def needed_parts(experiment: Mapping, layout: Layout) -> list[str]:
    """The parts with layers that what is measured goes through, or is merged from."""
    wanted = experiment["perplexity"]
    if "merged" in wanted["variants"]:
        return [part for part in "ABC" if layout.layers_of(part)]
    if "pruned" not in wanted["variants"]:
        return []
    largest = max(wanted["stages"], key=STAGES.index)
    return [part for part in PARTS_OF_STAGE[largest] if layout.layers_of(part)]


def merged_parts(experiment: Mapping, layout: Layout) -> list[str]:
    """The parts that are merged: those that hold layers, if merged stages are measured at all.

    With `restore: exact`, a part may have no adapter; it is merged if it puts back what another's has changed.
    """
    if "merged" not in experiment["perplexity"]["variants"]:
        return []
    held = [part for part in "ABC" if layout.layers_of(part)]
    return [p for p in held if experiment["adapters"][p] is not None or undone_part(experiment, layout, p)]


def trained_parts(experiment: Mapping, layout: Layout) -> list[str]:
    """The merged parts whose adapters are trained here rather than given."""
    return [part for part in merged_parts(experiment, layout) if experiment["adapters"][part] == TRAIN]


def closed_form_parts(experiment: Mapping, layout: Layout) -> list[str]:
    """The merged parts whose adapters are computed in closed form."""
    return [part for part in merged_parts(experiment, layout) if experiment["adapters"][part] == CLOSED_FORM]


def started_parts(experiment: Mapping, layout: Layout) -> list[str]:
    """The parts whose training starts from an adapter in closed form."""
    start = experiment["distill"]["start"]
    parts = trained_parts(experiment, layout)
    return [part for part in parts if (start.get(part) if isinstance(start, Mapping) else start)]


def calibration_texts(experiment: Mapping) -> dict[str, float]:
    """The texts of adapters in closed form with their weights: its own, or the one that is trained on."""
    return experiment["closed_form"]["datasets"] or {experiment["distill"]["dataset"]: 1.0}


def trains(experiment: Mapping, layout: Layout) -> bool:
    """Whether anything is trained: adapters, or what they are compared with."""
    return bool(trained_parts(experiment, layout) or experiment["baselines"])
