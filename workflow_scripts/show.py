from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.results.show import summary_table

with job(snakemake.log[0]):
    print(summary_table(snakemake.input[0]))
