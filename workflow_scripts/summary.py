from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.results.summary import Named, write_summary

files, params = snakemake.input, snakemake.params
with job(snakemake.log[0]):
    write_summary(
        [Named(*names, path=files.results[number]) for *names, number in params.results],
        snakemake.output.summary,
        snakemake.output.comparisons,
        merges={tuple(names): files.merges[number] for *names, number in params.merges},
    )
