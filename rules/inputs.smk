# Input and param functions: which files and directories a job of given wildcards needs.


def bundle_files(layers):
    """The files of a bundle directory."""
    return ["bundle_meta.json", *map(layer_file_name, layers)]


def experiment_dense_dir(wildcards):
    return dense_dir(wildcards.experiment)


def experiment_dense_files(wildcards):
    return dense_files(wildcards.experiment)


def pruned_part_dir(wildcards):
    return part_dir(wildcards.experiment, "pruned", wildcards.part)


def pruned_part_files(wildcards):
    return part_files(wildcards.experiment, "pruned", wildcards.part)


def pruned_log(wildcards):
    """The prune log of the A model, which merging carries over; an A model of another origin may have none."""
    log = f"{part_dir(wildcards.experiment, 'pruned', 'A')}/prune_log.json"
    given = "pruned" in config["experiments"][wildcards.experiment]
    return [] if given and not Path(log).is_file() else log


def skeleton_dir(wildcards):
    """The A model that a bundle belongs to."""
    return part_dir(wildcards.experiment, "pruned", "A")


def skeleton_manifest(wildcards):
    """The manifest that says which layers a bundle may hold."""
    return f"{skeleton_dir(wildcards)}/manifest.json"


def adapter_source_dir(wildcards):
    return adapter_dir(wildcards.experiment, wildcards.part)


def adapter_inputs(wildcards):
    return adapter_files(wildcards.experiment, wildcards.part)


def importance_dataset_name(wildcards):
    name = config["experiments"][wildcards.experiment]["importance"]["dataset"]
    if name is None:
        raise WorkflowError(f"experiments.{wildcards.experiment}.importance.dataset: needed to rank the blocks")
    return name


def importance_text_files(wildcards):
    return files_of_dataset(importance_dataset_name(wildcards))


def importance_dataset(wildcards):
    return config["datasets"][importance_dataset_name(wildcards)]


# Distillation: B is trained on A_merged with B restored, C on A_merged and B_merged with C restored.


def student_dir(wildcards):
    return part_dir(wildcards.experiment, "pruned" if wildcards.part == "A" else "merged", "A")


def student_bundle_dirs(wildcards):
    merged = {"A": "", "B": "", "C": "B"}[wildcards.part]
    own = wildcards.part.replace("A", "")
    layout = LAYOUTS[wildcards.experiment]
    return [
        *(part_dir(wildcards.experiment, "merged", part) for part in merged if layout.layers_of(part)),
        *(part_dir(wildcards.experiment, "pruned", part) for part in own),
    ]


def student_files(wildcards):
    """The files of the student, by part and variant."""
    wanted = {
        "A": {"student_a": ("pruned", "A")},
        "B": {"student_a": ("merged", "A"), "student_b": ("pruned", "B")},
        "C": {"student_a": ("merged", "A"), "student_b": ("merged", "B"), "student_c": ("pruned", "C")},
    }[wildcards.part]
    return {name: parts_files(wildcards.experiment, *which) for name, which in wanted.items()}


def train_windows_file(wildcards):
    dataset = config["experiments"][wildcards.experiment]["distill"]["dataset"]
    return f"results/{wildcards.experiment}/windows/{dataset}.train.safetensors"


def teacher_states_file(wildcards):
    """The teacher's final hidden states where the configuration shares them, else nothing: the teacher runs along."""
    if not config["experiments"][wildcards.experiment]["distill"]["share_teacher_states"]:
        return []
    return f"results/{wildcards.experiment}/adapters/teacher_states.safetensors"


# Perplexity: a segment starts from its parent's boundary activations, the first one from the token ids. Activations are
# not named in rule all, since they may be deleted; so everything that decides a result stands among its own inputs.


def activations_output(path):
    """Boundary activations, deleted after their last use unless the configuration keeps them for later adapters."""
    return path if config["keep_activations"] else temp(path)


def activations_file(wildcards, segment_name):
    return (
        f"results/{wildcards.experiment}/activations/{wildcards.dataset}/{wildcards.variant}/{segment_name}.safetensors"
    )


def segment_named(wildcards):
    return next(s for s in segments(wildcards.experiment, wildcards.variant) if s.name == wildcards.segment)


def segment_layers(wildcards):
    return list(segment_named(wildcards).layers)


def segment_source(wildcards):
    parent = segment_named(wildcards).parent
    return activations_file(wildcards, parent) if parent else []


def segment_weights(wildcards):
    """The files of every part on the way from the token ids to the segment's end."""
    tree = {s.name: s for s in segments(wildcards.experiment, wildcards.variant)}
    segment, parts = tree[wildcards.segment], {"A"}
    while segment:
        parts.add(segment.part)
        segment = tree.get(segment.parent)
    return parts_files(wildcards.experiment, wildcards.variant, sorted(parts))


def segment_weights_dir(wildcards):
    return part_dir(wildcards.experiment, wildcards.variant, segment_named(wildcards).part)


def variant_model_dir(wildcards):
    return part_dir(wildcards.experiment, wildcards.variant, "A")


def variant_config(wildcards):
    return f"{variant_model_dir(wildcards)}/config.json"


def stage_source(wildcards):
    source, _ = stage_run(segments(wildcards.experiment, wildcards.variant), wildcards.stage)
    return activations_file(wildcards, source) if source else []


def stage_tail(wildcards):
    """The layers that the stage's own job runs after the segment it starts from."""
    _, tail = stage_run(segments(wildcards.experiment, wildcards.variant), wildcards.stage)
    return list(tail.layers) if tail else []


def stage_weights(wildcards):
    """The files of all parts of the stage."""
    return parts_files(wildcards.experiment, wildcards.variant, PARTS_OF_STAGE[wildcards.stage])


def stage_bundle_dirs(wildcards):
    """The directories of the stage's bundles that hold layers, by part."""
    layout = LAYOUTS[wildcards.experiment]
    return {
        part: part_dir(wildcards.experiment, wildcards.variant, part)
        for part in PARTS_OF_STAGE[wildcards.stage]
        if part != "A" and layout.layers_of(part)
    }


def stage_weights_dir(wildcards):
    """The directory of the part that the tail lies in."""
    _, tail = stage_run(segments(wildcards.experiment, wildcards.variant), wildcards.stage)
    return part_dir(wildcards.experiment, wildcards.variant, tail.part if tail else "A")


def result_names(wildcards):
    """What a result is called in the summary; the dense model's rule has no wildcard `variant`."""
    variant = wildcards.get("variant", "dense")
    return {"experiment": wildcards.experiment, "dataset": wildcards.dataset, "variant": variant}


def stage_name(wildcards):
    return wildcards.stage


def dense_layers(wildcards):
    return list(range(LAYOUTS[wildcards.experiment].num_layers))


def teacher_hidden_file(wildcards):
    """The dense model's final hidden states where the stages are compared with it."""
    if not compares_with_dense(config["experiments"][wildcards.experiment]["perplexity"]):
        return []
    return f"results/{wildcards.experiment}/activations/{wildcards.dataset}/dense/final.safetensors"


def teacher_weights(wildcards):
    """What the dense model's hidden states are made from, where they are compared with."""
    wanted = config["experiments"][wildcards.experiment]["perplexity"]
    return dense_files(wildcards.experiment) if compares_with_dense(wanted) else []
