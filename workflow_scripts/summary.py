from mistral_prune_lora.console import job
from mistral_prune_lora.results.summary import write_summary

with job(snakemake.log[0]):
    write_summary(
        snakemake.input.results, snakemake.output.summary, snakemake.output.comparisons, snakemake.params.merges
    )
