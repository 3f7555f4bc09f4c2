from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.exporting.export import export_stage
    from mistral_prune_lora.workflow.job import folder, folders

with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    export_stage(
        folder(snakemake.input.model),
        snakemake.output.record.removesuffix("/export.json"),
        stage=snakemake.params.stage,
        bundles=dict(zip(snakemake.params.bundles, folders(snakemake.input.bundles), strict=True)),
        overwrite=True,
    )
