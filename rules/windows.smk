# Windows of token ids, for measuring, training and ranking alike.
#   in:  a text or examples, the tokenizer of a dense model
#   out: results/shared/windows/{made}.safetensors, and .json, which says what they are


checkpoint windows:
    input:
        dense=lambda wildcards: depends(PLAN.windows[wildcards.made].model),
        texts=lambda wildcards: given_files(PLAN.windows[wildcards.made].files),
    output:
        windows="results/shared/windows/{made}.safetensors",
        record="results/shared/windows/{made}.json",
    log:
        "logs/windows/{made}.log",
    benchmark:
        "benchmarks/windows/{made}.tsv"
    priority: HEALS
    conda:
        "../envs/torch.yaml"
    resources:
        **granted(lambda wildcards: needs.of_windows()),
    params:
        dataset=lambda wildcards, input: PLAN.windows[wildcards.made].dataset,
        seqlen=lambda wildcards: PLAN.windows[wildcards.made].seqlen,
        windows=lambda wildcards: PLAN.windows[wildcards.made].count,
        first=lambda wildcards: PLAN.windows[wildcards.made].first,
        code=code_of("windows"),
    script:
        "../workflow_scripts/windows.py"
