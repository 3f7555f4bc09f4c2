from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.cut import prune_model

params, results = snakemake.params, f"results/{snakemake.wildcards.experiment}/pruning"
with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    prune_model(
        params.dense_dir,
        Layout(params.num_layers, tuple(params.b_layers), tuple(params.c_layers)),
        save_dir=f"{results}/A",
        save_removed_dir=f"{results}/bundles",
        overwrite=True,
    )
