# A model and bundles B and C cut from the dense model; the ranking of blocks that helps to choose the layers.
#   in:  the dense model, the layers of B and C from the configuration
#   out: results/{experiment}/pruning/A/, results/{experiment}/pruning/bundles/{B,C}/
#        on request: results/{experiment}/importance.csv and importance.svg


for suffix, layout, members in layout_groups():

    rule:
        name:
            f"prune{suffix}"
        input:
            dense=experiment_dense_files,
        output:
            a=expand(
                "results/{{experiment}}/pruning/A/{file}",
                file=["config.json", "manifest.json", "layers_map.json", "prune_log.json", "model.safetensors"],
            ),
            b=expand("results/{{experiment}}/pruning/bundles/B/{file}", file=bundle_files(layout.b)),
            c=expand("results/{{experiment}}/pruning/bundles/C/{file}", file=bundle_files(layout.c)),
        log:
            "logs/prune/{experiment}.log",
        benchmark:
            "benchmarks/prune/{experiment}.tsv"
        wildcard_constraints:
            experiment=members,
        conda:
            "../envs/torch.yaml"
        params:
            dense_dir=experiment_dense_dir,
            num_layers=layout.num_layers,
            b_layers=layout.b,
            c_layers=layout.c,
            code=code_digest("pruning.cut"),
        script:
            "../workflow_scripts/prune.py"


rule importance:
    input:
        dense=experiment_dense_files,
        texts=importance_text_files,
    output:
        table="results/{experiment}/importance.csv",
        plot=report(
            "results/{experiment}/importance.svg", caption="../report/importance.rst", category="Layer importance"
        ),
    log:
        "logs/importance/{experiment}.log",
    benchmark:
        "benchmarks/importance/{experiment}.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        dense_dir=experiment_dense_dir,
        dataset=importance_dataset,
        drop=setting("importance", "drop"),
        keep_last_layer=setting("importance", "keep_last_layer"),
        candidates=setting("importance", "candidates"),
        seqlen=setting("importance", "seqlen"),
        windows=setting("importance", "windows"),
        dtype=setting("importance", "dtype"),
        code=code_digest("pruning.importance", "results.plots", "text.windows", "text.sources", "checkpoints.tokenizer"),
    script:
        "../workflow_scripts/importance.py"
