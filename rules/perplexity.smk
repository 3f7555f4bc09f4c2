# Perplexity of every stage. What several stages go through is computed once, as segments; a stage's own job runs only
# its tail from the segment it starts from.
#   in:  the parts of a variant (dense, pruned, merged), a text
#   out: results/{experiment}/activations/{dataset}/{variant}/{segment}.safetensors
#        results/{experiment}/ppl/{dataset}/{variant}.{stage}.json and .parquet (NLL of every window)


rule eval_windows:
    input:
        dense=experiment_dense_files,
        texts=dataset_files,
    output:
        "results/{experiment}/windows/{dataset}.eval.safetensors",
    log:
        "logs/eval_windows/{experiment}.{dataset}.log",
    benchmark:
        "benchmarks/eval_windows/{experiment}.{dataset}.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        tokenizer_dir=experiment_dense_dir,
        dataset=dataset_settings,
        seqlen=setting("perplexity", "seqlen"),
        windows=setting("perplexity", "windows"),
        code=code_digest("text.windows", "text.sources", "checkpoints.tokenizer"),
    script:
        "../workflow_scripts/windows.py"


rule segment:
    input:
        source=segment_source,
        windows="results/{experiment}/windows/{dataset}.eval.safetensors",
        weights=segment_weights,
        config=variant_config,
    output:
        activations_output("results/{experiment}/activations/{dataset}/{variant}/{segment}.safetensors"),
    log:
        "logs/segment/{experiment}.{dataset}.{variant}.{segment}.log",
    benchmark:
        "benchmarks/segment/{experiment}.{dataset}.{variant}.{segment}.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        model_dir=variant_model_dir,
        weights_dir=segment_weights_dir,
        layers=segment_layers,
        batch_size=setting("perplexity", "batch_size"),
        dtype=setting("perplexity", "dtype"),
        code=code_digest("evaluation.jobs"),
    script:
        "../workflow_scripts/segment.py"


# The dense model is measured whole, and its last hidden states are what the stages are compared with.
rule dense_perplexity:
    input:
        windows="results/{experiment}/windows/{dataset}.eval.safetensors",
        weights=experiment_dense_files,
    output:
        result="results/{experiment}/ppl/{dataset}/dense.FULL.json",
        windows="results/{experiment}/ppl/{dataset}/dense.FULL.parquet",
        final_hidden=activations_output("results/{experiment}/activations/{dataset}/dense/final.safetensors"),
    log:
        "logs/dense_perplexity/{experiment}.{dataset}.log",
    benchmark:
        "benchmarks/dense_perplexity/{experiment}.{dataset}.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        stage="FULL",
        names=result_names,
        model_dir=experiment_dense_dir,
        weights_dir=experiment_dense_dir,
        layers=dense_layers,
        dense_dir=experiment_dense_dir,
        batch_size=setting("perplexity", "batch_size"),
        dtype=setting("perplexity", "dtype"),
        code=code_digest("evaluation.jobs"),
    script:
        "../workflow_scripts/perplexity.py"


rule perplexity:
    input:
        source=stage_source,
        windows="results/{experiment}/windows/{dataset}.eval.safetensors",
        weights=stage_weights,
        teacher=teacher_hidden_file,
        dense=teacher_weights,
    output:
        result="results/{experiment}/ppl/{dataset}/{variant}.{stage}.json",
        windows="results/{experiment}/ppl/{dataset}/{variant}.{stage}.parquet",
    log:
        "logs/perplexity/{experiment}.{dataset}.{variant}.{stage}.log",
    benchmark:
        "benchmarks/perplexity/{experiment}.{dataset}.{variant}.{stage}.tsv"
    wildcard_constraints:
        variant="pruned|merged",
    conda:
        "../envs/torch.yaml"
    params:
        stage=stage_name,
        names=result_names,
        model_dir=variant_model_dir,
        weights_dir=stage_weights_dir,
        layers=stage_tail,
        dense_dir=experiment_dense_dir,
        batch_size=setting("perplexity", "batch_size"),
        dtype=setting("perplexity", "dtype"),
        code=code_digest("evaluation.jobs"),
    script:
        "../workflow_scripts/perplexity.py"
