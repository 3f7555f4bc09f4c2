from pathlib import Path

from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.layout.partition import Layout
    from mistral_prune_lora.pruning.cut import prune_model
    from mistral_prune_lora.workflow.job import folder

params, made = snakemake.params, Path(snakemake.output.a[0]).parents[1]
with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    prune_model(
        folder(snakemake.input.dense),
        Layout(params.num_layers, tuple(params.b_layers), tuple(params.c_layers)),
        save_dir=made / "A",
        save_removed_dir=made / "bundles",
        overwrite=True,
    )
