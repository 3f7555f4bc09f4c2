# Input and param functions: what a job of given wildcards reads, and what it is told.


def importance_windows(wildcards):
    dataset = EXPERIMENTS[wildcards.experiment].settings["importance"]["dataset"]
    if dataset is None:
        raise WorkflowError(f"experiments.{wildcards.experiment}.importance.dataset: needed to rank the blocks")
    return EXPERIMENTS[wildcards.experiment].windows("importance", dataset)


def importance_setting(key):
    """An input function that gives one value of the experiment's ranking, so that a param tracks that value."""
    return lambda wildcards: EXPERIMENTS[wildcards.experiment].settings["importance"][key]


def curve_of(training):
    """The loss of every update of a training."""
    return f"{training.folder}/training.csv"


def states_files(states):
    """Stored hidden states where the configuration shares them, else nothing: those layers run along."""
    return states.file if states else []


def start_of(made):
    """The adapter that a training starts from, if there is one."""
    start = PLAN.trainings[made].start
    return depends(start.source) if start else []


def shards_of(wildcards, artefacts, maker, endings=("safetensors",)):
    """The shards that an artefact is gathered from; none where one job makes it, nor for a shard itself.

    How many windows a text has is known once they are cut, so a number of shards that follows from them is too.
    """
    if "shard" in wildcards.keys():
        return []
    made, (file, *_) = artefacts[wildcards.made], maker.rule.expand_output(wildcards)[0]

    def find():
        depends(made.windows.source)
        known = made_of(workflow.persistence.input(file))
        if made.shards == 1 or known is not None:
            return known or 1
        record = next(path for path in OUTPUTS[made.windows.source] if path.endswith(".json"))
        return sensible(made.shards, read_json(record)["windows"], made.batch_size)

    kind, count = Path(file).parent.name, SHARDS.count(str(file), find, keep=not workflow.dryrun)
    return shard_files(kind, made.name, count, endings) if count > 1 else []


def gathers(wildcards, maker):
    """Whether a job puts shards together rather than running anything."""
    return "shard" not in wildcards.keys() and SHARDS.known(str(maker.rule.expand_output(wildcards)[0][0])) > 1


def needed_by(artefacts, need, maker):
    """What a job needs that makes an artefact, a shard of it, or the artefact out of its shards."""

    def needed(wildcards):
        if gathers(wildcards, maker()):
            return needs.of_gathering(artefacts[wildcards.made])
        return need(artefacts[wildcards.made], int(wildcards.get("shard", "1-of-1").split("-")[-1]))

    return needed


def threads_of(maker):
    """The threads of such a job."""
    return lambda wildcards: 1 if gathers(wildcards, maker()) else COMPUTE_THREADS


def held_out_windows(made):
    """The windows that a training is looked at on, if there are any."""
    held = PLAN.trainings[made].held_out
    return depends(held.windows.source) if held else []


def held_out_states(made, kind):
    """Stored hidden states of those windows."""
    held = PLAN.trainings[made].held_out
    return states_files(getattr(held, kind)) if held else []


def station_files(made):
    """The dense model's states that an adapter in closed form reads: the first of every text, the second, and so on."""
    ways = PLAN.closed_forms[made].stations
    return [activations_of(run) for runs in zip(*ways, strict=True) for run in runs]


def activations_of(run):
    """The hidden states at the end of a run; none where there is no such run."""
    return run.activations if run else []


def compared_model(wildcards):
    """What those hidden states are made from."""
    dense = PLAN.scores[wildcards.made].dense
    return depends(dense.model) if dense else []


def stage_bundles(wildcards):
    """The bundles of a stage that hold layers, by part."""
    experiment = EXPERIMENTS[wildcards.experiment]
    bundles = [p for p in PARTS_OF_STAGE[wildcards.stage] if p != "A" and experiment.layout.layers_of(p)]
    return {part: experiment.part(wildcards.variant, part) for part in bundles}


PLACE = f"{shlex.quote(sys.executable)} -m mistral_prune_lora.workflow.place"


def experiments_by(key):
    """Experiments by something about them, None left out, in an order that theirs does not change."""
    groups = {}
    for experiment in EXPERIMENTS.values():
        groups.setdefault(key(experiment), []).append(experiment.name)
    return sorted((value, sorted(members)) for value, members in groups.items() if value is not None)


def once(things):
    """Things that several experiments may share, and how to find each again: its number among them."""
    numbers = {}
    for thing in things:
        numbers.setdefault(thing, len(numbers))
    return numbers


def rankings():
    """The rankings of blocks that are there, with their digests: they are made on request, and not made for a report."""
    tables = {name: f"results/{name}/importance.csv" for name in EXPERIMENTS}
    return {name: [path, file_sha256(path)] for name, path in tables.items() if Path(path).is_file()}


def page(name, shown, category):
    """A page of the report."""
    return report(
        f"results/report{OF_CONFIG}/{name}.html",
        caption=f"../report/{name}.rst",
        category=category,
        labels={"page": shown},
    )
