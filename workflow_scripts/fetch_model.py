from mistral_prune_lora.console import job
from mistral_prune_lora.dense.fetch import fetch_dense

with job(snakemake.log[0]):
    fetch_dense(snakemake.params.source, snakemake.output.config.removesuffix("/config.json"), overwrite=True)
