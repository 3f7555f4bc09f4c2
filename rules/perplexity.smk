# Perplexity of every stage. What several stages go through is computed once, as segments; a stage's own job runs only
# its tail from the segment it starts from.
#   in:  the parts of a variant (dense, pruned, merged), windows
#   out: results/shared/activations/{made}.safetensors
#        results/shared/ppl/{made}.json and .parquet (NLL of every window)
# Activations are not named in rule all, since they may be deleted; so everything that decides a result stands among its
# own inputs.


rule segment:
    input:
        shards=lambda wildcards: shards_of(wildcards, PLAN.segments, rules.segment),
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
    priority: LEADS_ON
    conda:
        "../envs/torch.yaml"
    threads: threads_of(lambda: rules.segment)
    resources:
        **granted(needed_by(PLAN.segments, needs.of_segment, lambda: rules.segment)),
    params:
        layers=lambda wildcards: PLAN.segments[wildcards.made].layers,
        batch_size=lambda wildcards: PLAN.segments[wildcards.made].batch_size,
        dtype=lambda wildcards: PLAN.segments[wildcards.made].dtype,
        code=code_of("segment"),
    script:
        "../workflow_scripts/segment.py"


# Some of the windows, where several jobs share them; `segment` then gathers what they made. So it is with the others.
use rule segment as segment_shard with:
    output:
        temp("results/shared/shards/activations/{made}.{shard}.safetensors"),
    log:
        "logs/segment/{made}.{shard}.log",
    benchmark:
        "benchmarks/segment/{made}.{shard}.tsv"


# The dense model is measured whole, and its last hidden states are what the stages are compared with.
rule dense_perplexity:
    input:
        shards=lambda wildcards: shards_of(wildcards, PLAN.scores, rules.dense_perplexity, ("json", "safetensors")),
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
    threads: threads_of(lambda: rules.dense_perplexity)
    resources:
        **granted(needed_by(PLAN.scores, needs.of_score, lambda: rules.dense_perplexity)),
    params:
        stage="FULL",
        layers=lambda wildcards: PLAN.scores[wildcards.made].layers,
        batch_size=lambda wildcards: PLAN.scores[wildcards.made].batch_size,
        dtype=lambda wildcards: PLAN.scores[wildcards.made].dtype,
        code=code_of("perplexity"),
    script:
        "../workflow_scripts/perplexity.py"


use rule dense_perplexity as dense_perplexity_shard with:
    output:
        result=temp("results/shared/shards/ppl/{made}.{shard}.json"),
        final_hidden=temp("results/shared/shards/ppl/{made}.{shard}.safetensors"),
    log:
        "logs/dense_perplexity/{made}.{shard}.log",
    benchmark:
        "benchmarks/dense_perplexity/{made}.{shard}.tsv"


rule perplexity:
    input:
        shards=lambda wildcards: shards_of(wildcards, PLAN.scores, rules.perplexity, ("json",)),
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
    threads: threads_of(lambda: rules.perplexity)
    resources:
        **granted(needed_by(PLAN.scores, needs.of_score, lambda: rules.perplexity)),
    params:
        stage=lambda wildcards: PLAN.scores[wildcards.made].label,
        layers=lambda wildcards: PLAN.scores[wildcards.made].layers,
        batch_size=lambda wildcards: PLAN.scores[wildcards.made].batch_size,
        dtype=lambda wildcards: PLAN.scores[wildcards.made].dtype,
        code=code_of("perplexity"),
    script:
        "../workflow_scripts/perplexity.py"


use rule perplexity as perplexity_shard with:
    output:
        result=temp("results/shared/shards/ppl/{made}.{shard}.json"),
    log:
        "logs/perplexity/{made}.{shard}.log",
    benchmark:
        "benchmarks/perplexity/{made}.{shard}.tsv"
