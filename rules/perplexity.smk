# Perplexity of every stage. What several stages go through is computed once, as segments; a stage's own job runs only
# its tail from the segment it starts from.
#   in:  the parts of a variant (dense, pruned, merged), windows
#   out: results/shared/activations/{made}.safetensors
#        results/shared/ppl/{made}.json and .parquet (NLL of every window)
# Activations are not named in rule all, since they may be deleted; so everything that decides a result stands among its
# own inputs.


rule segment:
    input:
        source=lambda wildcards: activations_of(PLAN.segments[wildcards.made].source),
        windows=lambda wildcards: depends(PLAN.segments[wildcards.made].windows.source),
        model=lambda wildcards: depends(PLAN.segments[wildcards.made].model),
        weights=lambda wildcards: depends(PLAN.segments[wildcards.made].weights),
        parts=lambda wildcards: depends(*PLAN.segments[wildcards.made].read),
        restores=lambda wildcards: depends(*PLAN.segments[wildcards.made].restores),
    output:
        activations_output("results/shared/activations/{made}.safetensors"),
    log:
        "logs/segment/{made}.log",
    benchmark:
        "benchmarks/segment/{made}.tsv"
    wildcard_constraints:
        made=names(PLAN.segments),
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_segment(PLAN.segments[wildcards.made])),
    params:
        layers=lambda wildcards: PLAN.segments[wildcards.made].layers,
        batch_size=lambda wildcards: PLAN.segments[wildcards.made].batch_size,
        dtype=lambda wildcards: PLAN.segments[wildcards.made].dtype,
        code=code_of("segment"),
    script:
        "../workflow_scripts/segment.py"


# The dense model is measured whole, and its last hidden states are what the stages are compared with.
rule dense_perplexity:
    input:
        windows=lambda wildcards: depends(PLAN.scores[wildcards.made].windows.source),
        model=lambda wildcards: depends(PLAN.scores[wildcards.made].model),
        weights=lambda wildcards: depends(PLAN.scores[wildcards.made].model),
    output:
        result="results/shared/ppl/{made}.json",
        windows="results/shared/ppl/{made}.parquet",
        final_hidden=activations_output("results/shared/activations/{made}.safetensors"),
    log:
        "logs/dense_perplexity/{made}.log",
    benchmark:
        "benchmarks/dense_perplexity/{made}.tsv"
    wildcard_constraints:
        made=names(name for name, score in PLAN.scores.items() if score.keeps),
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_score(PLAN.scores[wildcards.made])),
    params:
        stage="FULL",
        layers=lambda wildcards: PLAN.scores[wildcards.made].layers,
        batch_size=lambda wildcards: PLAN.scores[wildcards.made].batch_size,
        dtype=lambda wildcards: PLAN.scores[wildcards.made].dtype,
        code=code_of("perplexity"),
    script:
        "../workflow_scripts/perplexity.py"


rule perplexity:
    input:
        source=lambda wildcards: activations_of(PLAN.scores[wildcards.made].source),
        windows=lambda wildcards: depends(PLAN.scores[wildcards.made].windows.source),
        model=lambda wildcards: depends(PLAN.scores[wildcards.made].model),
        weights=lambda wildcards: depends(PLAN.scores[wildcards.made].weights),
        parts=lambda wildcards: depends(*PLAN.scores[wildcards.made].read),
        restores=lambda wildcards: depends(*PLAN.scores[wildcards.made].restores),
        teacher=lambda wildcards: activations_of(PLAN.scores[wildcards.made].dense),
        dense=compared_model,
    output:
        result="results/shared/ppl/{made}.json",
        windows="results/shared/ppl/{made}.parquet",
    log:
        "logs/perplexity/{made}.log",
    benchmark:
        "benchmarks/perplexity/{made}.tsv"
    wildcard_constraints:
        made=names(name for name, score in PLAN.scores.items() if not score.keeps),
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_score(PLAN.scores[wildcards.made])),
    params:
        stage=lambda wildcards: PLAN.scores[wildcards.made].label,
        layers=lambda wildcards: PLAN.scores[wildcards.made].layers,
        batch_size=lambda wildcards: PLAN.scores[wildcards.made].batch_size,
        dtype=lambda wildcards: PLAN.scores[wildcards.made].dtype,
        code=code_of("perplexity"),
    script:
        "../workflow_scripts/perplexity.py"
