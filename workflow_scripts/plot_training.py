from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.results.plots import plot_training

with job(snakemake.log[0]):
    curves = dict(zip(snakemake.params.labels, snakemake.input, strict=True))
    plot_training(curves, snakemake.output[0])
