# LoRA adapters trained by distillation from the dense model, each on the model that the parts before it make.
#   in:  the dense model, pruned parts, for B also A_merged, for C also A_merged and B_merged
#   out: results/{experiment}/adapters/{A,B,C}_lora/, stock PEFT directories


rule train_windows:
    input:
        dense=experiment_dense_files,
        texts=dataset_files,
    output:
        "results/{experiment}/windows/{dataset}.train.safetensors",
    log:
        "logs/train_windows/{experiment}.{dataset}.log",
    benchmark:
        "benchmarks/train_windows/{experiment}.{dataset}.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        tokenizer_dir=experiment_dense_dir,
        dataset=dataset_settings,
        seqlen=setting("distill", "seqlen"),
        windows=setting("distill", "windows"),
        code=code_digest("text.windows", "text.sources", "checkpoints.tokenizer"),
    script:
        "../workflow_scripts/windows.py"


rule teacher_states:
    input:
        dense=experiment_dense_files,
        windows=train_windows_file,
    output:
        "results/{experiment}/adapters/teacher_states.safetensors",
    log:
        "logs/teacher_states/{experiment}.log",
    benchmark:
        "benchmarks/teacher_states/{experiment}.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        dense_dir=experiment_dense_dir,
        dtype=setting("distill", "dtype"),
        code=code_digest("distillation.teacher_states"),
    script:
        "../workflow_scripts/teacher_states.py"


rule train_adapter:
    input:
        unpack(student_files),
        dense=experiment_dense_files,
        windows=train_windows_file,
        teacher_states=teacher_states_file,
    output:
        config="results/{experiment}/adapters/{part}_lora/adapter_config.json",
        weights="results/{experiment}/adapters/{part}_lora/adapter_model.safetensors",
        curve="results/{experiment}/adapters/{part}_lora/training.csv",
    log:
        "logs/train_adapter/{experiment}.{part}.log",
    benchmark:
        "benchmarks/train_adapter/{experiment}.{part}.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        student_dir=student_dir,
        bundle_dirs=student_bundle_dirs,
        dense_dir=experiment_dense_dir,
        dtype=setting("distill", "dtype"),
        seed=setting("distill", "seed"),
        gradient_checkpointing=setting("distill", "gradient_checkpointing"),
        lora=setting("distill", "lora"),
        loss=setting("distill", "loss"),
        optimiser=setting("distill", "parts", "{part}"),
        code=code_digest("distillation.train"),
    script:
        "../workflow_scripts/train_adapter.py"
