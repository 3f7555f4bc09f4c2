# LoRA adapters trained by distillation from the dense model, each on the model that the parts before it make.
#   in:  the dense model, pruned parts, for B also A_merged, for C also A_merged and B_merged
#   out: results/shared/adapters/{made}/, stock PEFT directories


rule teacher_states:
    input:
        dense=lambda wildcards: depends(PLAN.teachers[wildcards.made].model),
        windows=lambda wildcards: depends(PLAN.teachers[wildcards.made].windows.source),
    output:
        "results/shared/teacher_states/{made}.safetensors",
    log:
        "logs/teacher_states/{made}.log",
    benchmark:
        "benchmarks/teacher_states/{made}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_teacher(PLAN.teachers[wildcards.made])),
    params:
        dtype=lambda wildcards: PLAN.teachers[wildcards.made].dtype,
        code=code_of("teacher_states"),
    script:
        "../workflow_scripts/teacher_states.py"


checkpoint train_adapter:
    input:
        student=lambda wildcards: depends(PLAN.trainings[wildcards.made].student),
        bundles=lambda wildcards: depends(*PLAN.trainings[wildcards.made].bundles),
        dense=lambda wildcards: depends(PLAN.trainings[wildcards.made].model),
        windows=lambda wildcards: depends(PLAN.trainings[wildcards.made].windows.source),
        teacher_states=teacher_states_file,
    output:
        config="results/shared/adapters/{made}/adapter_config.json",
        weights="results/shared/adapters/{made}/adapter_model.safetensors",
        curve="results/shared/adapters/{made}/training.csv",
        record="results/shared/adapters/{made}/training.json",
    log:
        "logs/train_adapter/{made}.log",
    benchmark:
        "benchmarks/train_adapter/{made}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_training(PLAN.trainings[wildcards.made])),
    params:
        part=lambda wildcards: PLAN.trainings[wildcards.made].part,
        settings=lambda wildcards: PLAN.trainings[wildcards.made].settings,
        code=code_of("train_adapter"),
    script:
        "../workflow_scripts/train_adapter.py"
