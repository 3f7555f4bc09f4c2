import sys

from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.results.baseline import write_baseline
    from mistral_prune_lora.results.seeds import write_seeds

files, params = snakemake.input, snakemake.params
with job(snakemake.log[0]):
    write_seeds(files.summary, params.sweeps, snakemake.output.seeds)
    windows = {tuple(names): files.windows[number] for *names, number in params.results}
    for line in write_baseline(files.summary, windows, params.baselines, snakemake.output.baseline):
        print(f"left out: {line}", file=sys.stderr)
