from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.dense.fetch import fetch_dense
    from mistral_prune_lora.device import granted

with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    fetch_dense(snakemake.params.source, snakemake.output.config.removesuffix("/config.json"), overwrite=True)
