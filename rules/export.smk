# One stage as a checkpoint that other software loads: its layers numbered without gaps, in one weight file.
#   in:  the parts of a variant (pruned, merged) that the stage has
#   out: on request: results/{experiment}/exported/{variant}.{stage}/, with export.json, the record of what went into it
#        e.g. `snakemake results/smollm2/exported/merged.FULL/model.safetensors --cores 1`


rule export_stage:
    input:
        weights=stage_weights,
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
    params:
        stage=stage_name,
        model_dir=variant_model_dir,
        bundle_dirs=stage_bundle_dirs,
        code=code_digest("exporting.export"),
    script:
        "../workflow_scripts/export_stage.py"
