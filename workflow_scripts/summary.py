from mistral_prune_lora.summary import write_summary

from mistral_prune_lora.console import job

with job(snakemake.log[0]):
    write_summary(snakemake.input, snakemake.output.summary, snakemake.output.comparisons)
