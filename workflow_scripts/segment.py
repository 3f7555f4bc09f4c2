from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.evaluation.jobs import RunInputs, run_segment
from mistral_prune_lora.streaming.compute import Compute

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    run_segment(
        RunInputs(
            params.model_dir,
            params.weights_dir,
            params.layers,
            windows=snakemake.input.windows,
            source=snakemake.input.source or None,
        ),
        snakemake.output[0],
        Compute.named(given.device, params.dtype, params.batch_size, given.memory_bytes),
    )
