# One stage as a checkpoint that other software loads: its layers numbered without gaps, in one weight file.
#   in:  the parts of a variant (pruned, merged) that the stage has
#   out: on request: results/{experiment}/exported/{variant}.{stage}/, with export.json, the record of what went into it
#        e.g. `snakemake results/smollm2/exported/merged.FULL/model.safetensors --cores 1`


rule export_stage:
    input:
        model=lambda wildcards: reads(EXPERIMENTS[wildcards.experiment].part(wildcards.variant, "A")),
        bundles=lambda wildcards: reads(*stage_bundles(wildcards).values()),
    output:
        config="results/{experiment}/exported/{variant}.{stage}/config.json",
        weights="results/{experiment}/exported/{variant}.{stage}/model.safetensors",
        record="results/{experiment}/exported/{variant}.{stage}/export.json",
    log:
        "logs/export_stage/{experiment}.{variant}.{stage}.log",
    benchmark:
        "benchmarks/export_stage/{experiment}.{variant}.{stage}.tsv"
    wildcard_constraints:
        variant="pruned|merged",
    conda:
        "../envs/torch.yaml"
    threads: STREAM_THREADS
    resources:
        **granted(lambda wildcards: needs.of_export(EXPERIMENTS[wildcards.experiment], wildcards.stage)),
    params:
        stage=lambda wildcards: wildcards.stage,
        bundles=lambda wildcards: list(stage_bundles(wildcards)),
        made_from=lambda wildcards: [
            part.identity
            for part in EXPERIMENTS[wildcards.experiment].parts(wildcards.variant, PARTS_OF_STAGE[wildcards.stage])
        ],
        code=code_of("export_stage"),
    script:
        "../workflow_scripts/export_stage.py"
