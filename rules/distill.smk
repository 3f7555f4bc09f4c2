# LoRA adapters trained by distillation from the dense model, each on the model that the parts before it make.
#   in:  the dense model, pruned parts, for B also A_merged, for C also A_merged and B_merged; windows
#   out: results/shared/adapters/{made}/, stock PEFT directories; of parts that are trained together, one below for each
# While an adapter is trained, {made}.unfinished lies beside it, from which a killed job goes on.


rule teacher_states:
    input:
        shards=lambda wildcards: shards_of(wildcards, PLAN.teachers, rules.teacher_states),
        dense=lambda wildcards: depends(PLAN.teachers[wildcards.made].model),
        windows=lambda wildcards: depends(PLAN.teachers[wildcards.made].windows.source),
    output:
        "results/shared/teacher_states/{made}.safetensors",
    log:
        "logs/teacher_states/{made}.log",
    benchmark:
        "benchmarks/teacher_states/{made}.tsv"
    priority: IS_LEARNT_FROM
    conda:
        "../envs/torch.yaml"
    threads: threads_of(lambda: rules.teacher_states)
    resources:
        **granted(needed_by(PLAN.teachers, needs.of_teacher, lambda: rules.teacher_states)),
    params:
        dtype=lambda wildcards: PLAN.teachers[wildcards.made].dtype,
        layer=lambda wildcards: PLAN.teachers[wildcards.made].layer,
        code=code_of("teacher_states"),
    script:
        "../workflow_scripts/teacher_states.py"


use rule teacher_states as teacher_states_shard with:
    output:
        temp("results/shared/shards/teacher_states/{made}.{shard}.safetensors"),
    log:
        "logs/teacher_states/{made}.{shard}.log",
    benchmark:
        "benchmarks/teacher_states/{made}.{shard}.tsv"


# What enters the first adapted layer: frozen, and so the same for every pass, seed and setting.
rule prefix_states:
    input:
        shards=lambda wildcards: shards_of(wildcards, PLAN.prefixes, rules.prefix_states),
        student=lambda wildcards: depends(PLAN.prefixes[wildcards.made].student),
        bundles=lambda wildcards: depends(*PLAN.prefixes[wildcards.made].bundles),
        windows=lambda wildcards: depends(PLAN.prefixes[wildcards.made].windows.source),
        start=lambda wildcards: states_files(PLAN.prefixes[wildcards.made].start),
    output:
        "results/shared/prefix_states/{made}.safetensors",
    log:
        "logs/prefix_states/{made}.log",
    benchmark:
        "benchmarks/prefix_states/{made}.tsv"
    priority: IS_LEARNT_FROM
    conda:
        "../envs/torch.yaml"
    threads: threads_of(lambda: rules.prefix_states)
    resources:
        **granted(needed_by(PLAN.prefixes, needs.of_prefix, lambda: rules.prefix_states)),
    params:
        first=lambda wildcards: PLAN.prefixes[wildcards.made].first,
        dtype=lambda wildcards: PLAN.prefixes[wildcards.made].dtype,
        code=code_of("prefix_states"),
    script:
        "../workflow_scripts/prefix_states.py"


use rule prefix_states as prefix_states_shard with:
    output:
        temp("results/shared/shards/prefix_states/{made}.{shard}.safetensors"),
    log:
        "logs/prefix_states/{made}.{shard}.log",
    benchmark:
        "benchmarks/prefix_states/{made}.{shard}.tsv"


# No training: what a cut takes from the stream, regressed on the layer before it.
checkpoint closed_form:
    input:
        student=lambda wildcards: depends(PLAN.closed_forms[wildcards.made].student),
        bundles=lambda wildcards: depends(*PLAN.closed_forms[wildcards.made].bundles),
        dense=lambda wildcards: depends(PLAN.closed_forms[wildcards.made].model),
        windows=lambda wildcards: depends(*(cut.source for cut, _ in PLAN.closed_forms[wildcards.made].texts)),
        stations=lambda wildcards: station_files(wildcards.made),
    output:
        adapter=expand("results/shared/adapters/{{made}}/{file}", file=ClosedForm.names[:-1]),
        record="results/shared/adapters/{made}/closed_form.json",
    log:
        "logs/closed_form/{made}.log",
    benchmark:
        "benchmarks/closed_form/{made}.tsv"
    wildcard_constraints:
        made=names(PLAN.closed_forms),
    priority: HEALS
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_closed_form(PLAN.closed_forms[wildcards.made])),
    params:
        part=lambda wildcards: PLAN.closed_forms[wildcards.made].part,
        weights=lambda wildcards: [weight for _, weight in PLAN.closed_forms[wildcards.made].texts],
        settings=lambda wildcards: PLAN.closed_forms[wildcards.made].settings,
        code=code_of("closed_form"),
    script:
        "../workflow_scripts/closed_form.py"


for rule_name, trainings in by_rule(PLAN.trainings):

    checkpoint:
        name:
            rule_name
        input:
            student=lambda wildcards: depends(PLAN.trainings[wildcards.made].student),
            bundles=lambda wildcards: depends(*PLAN.trainings[wildcards.made].bundles),
            dense=lambda wildcards: depends(PLAN.trainings[wildcards.made].model),
            windows=lambda wildcards: depends(PLAN.trainings[wildcards.made].data.windows.source),
            teacher_states=lambda wildcards: states_files(PLAN.trainings[wildcards.made].data.teacher),
            layer_states=lambda wildcards: states_files(PLAN.trainings[wildcards.made].data.teacher_layer),
            prefix_states=lambda wildcards: states_files(PLAN.trainings[wildcards.made].data.prefix),
            start=lambda wildcards: start_of(wildcards.made),
            held_out=lambda wildcards: held_out_windows(wildcards.made),
            held_out_teacher=lambda wildcards: held_out_states(wildcards.made, "teacher"),
            held_out_prefix=lambda wildcards: held_out_states(wildcards.made, "prefix"),
        output:
            adapter=expand("results/shared/adapters/{{made}}/{file}", file=trainings[0].names[:-1]),
            record="results/shared/adapters/{made}/training.json",
        log:
            "logs/train_adapter/{made}.log",
        benchmark:
            "benchmarks/train_adapter/{made}.tsv"
        wildcard_constraints:
            made=names(training.name for training in trainings),
        priority: HEALS
        conda:
            "../envs/torch.yaml"
        threads: COMPUTE_THREADS
        # How often the state is saved and who else is told changes nothing of the adapter, so it is no param.
        resources:
            **granted(lambda wildcards: needs.of_training(PLAN.trainings[wildcards.made])),
            save_steps=lambda wildcards: PLAN.trainings[wildcards.made].running["save_steps"],
            loggers=lambda wildcards: ",".join(PLAN.trainings[wildcards.made].running["loggers"]) or "none",
        params:
            part=lambda wildcards: PLAN.trainings[wildcards.made].part,
            settings=lambda wildcards: PLAN.trainings[wildcards.made].settings,
            code=code_of("train_adapter"),
        script:
            "../workflow_scripts/train_adapter.py"
