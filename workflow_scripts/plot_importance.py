from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.results.plots import plot_importance

with job(snakemake.log[0]):
    plot_importance(snakemake.input[0], snakemake.output[0])
