from mistral_prune_lora.console import job
from mistral_prune_lora.results.summary import Named, write_summary

results = zip(snakemake.params.results, snakemake.input.results, strict=True)
merges = zip(snakemake.params.merges, snakemake.input.merges, strict=True)
with job(snakemake.log[0]):
    write_summary(
        [Named(*names, path) for names, path in results],
        snakemake.output.summary,
        snakemake.output.comparisons,
        merges={tuple(names): path for names, path in merges},
    )
