from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted_device, granted_memory
from mistral_prune_lora.evaluation.stages import run_segment

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    device = granted_device(resources.get("gpu", 1))
    run_segment(
        model_dir=params.model_dir,
        weights_dir=params.weights_dir,
        layers=params.layers,
        windows=snakemake.input.windows,
        source=snakemake.input.source or None,
        output=snakemake.output[0],
        dtype=params.dtype,
        device=device,
        batch_size=params.batch_size,
        max_memory=granted_memory(resources.get("mem_mb"), device),
    )
