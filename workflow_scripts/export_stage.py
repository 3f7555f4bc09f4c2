from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.exporting.export import export_stage

with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    export_stage(
        snakemake.params.model_dir,
        snakemake.output.record.removesuffix("/export.json"),
        stage=snakemake.params.stage,
        bundles=snakemake.params.bundle_dirs,
        overwrite=True,
    )
