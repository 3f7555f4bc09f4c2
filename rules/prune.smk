# A model and bundles B and C cut from the dense model; the ranking of blocks that helps to choose the layers.
#   in:  the dense model, the layers of B and C from the configuration
#   out: results/shared/pruning/{made}/A/, results/shared/pruning/{made}/bundles/{B,C}/
#        on request: results/{experiment}/importance.csv and importance.svg


for rule_name, prunings in by_rule(PLAN.prunings):
    layout = prunings[0].layout

    checkpoint:
        name:
            rule_name
        input:
            dense=lambda wildcards: depends(PLAN.prunings[wildcards.made].model),
        output:
            a=expand("results/shared/pruning/{{made}}/A/{file}", file=[*MODEL_FILES, "prune.json"]),
            b=expand("results/shared/pruning/{{made}}/bundles/B/{file}", file=[*bundle_files(layout.b), "prune.json"]),
            c=expand("results/shared/pruning/{{made}}/bundles/C/{file}", file=[*bundle_files(layout.c), "prune.json"]),
        log:
            "logs/prune/{made}.log",
        benchmark:
            "benchmarks/prune/{made}.tsv"
        wildcard_constraints:
            made=names(pruning.name for pruning in prunings),
        priority: HEALS
        conda:
            "../envs/torch.yaml"
        resources:
            **granted(lambda wildcards: needs.of_pruning(PLAN.prunings[wildcards.made])),
        params:
            num_layers=layout.num_layers,
            b_layers=layout.b,
            c_layers=layout.c,
            code=code_of("prune"),
        script:
            "../workflow_scripts/prune.py"


rule importance:
    input:
        dense=lambda wildcards: reads(EXPERIMENTS[wildcards.experiment].model),
        windows=lambda wildcards: reads(importance_windows(wildcards).source),
    output:
        "results/{experiment}/importance.csv",
    log:
        "logs/importance/{experiment}.log",
    benchmark:
        "benchmarks/importance/{experiment}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_importance(EXPERIMENTS[wildcards.experiment])),
    params:
        model=lambda wildcards: EXPERIMENTS[wildcards.experiment].model.identity,
        drop=importance_setting("drop"),
        keep_last_layer=importance_setting("keep_last_layer"),
        candidates=importance_setting("candidates"),
        dtype=importance_setting("dtype"),
        code=code_of("importance"),
    script:
        "../workflow_scripts/importance.py"


rule plot_importance:
    input:
        "results/{experiment}/importance.csv",
    output:
        report(
            "results/{experiment}/importance.svg",
            caption="../report/importance.rst",
            category="3 Layers",
            labels={"page": "ranking, still"},
        ),
    log:
        "logs/plot_importance/{experiment}.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        code=code_of("plot_importance"),
    script:
        "../workflow_scripts/plot_importance.py"
