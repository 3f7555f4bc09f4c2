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


def held_out_windows(made):
    """The windows that a training is looked at on, if there are any."""
    held = PLAN.trainings[made].held_out
    return depends(held.windows.source) if held else []


def held_out_states(made, kind):
    """Stored hidden states of those windows."""
    held = PLAN.trainings[made].held_out
    return states_files(getattr(held, kind)) if held else []


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
