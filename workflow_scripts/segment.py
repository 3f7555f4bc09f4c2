from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.evaluation.jobs import RunInputs, run_segment
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    run_segment(
        RunInputs(
            folder(snakemake.input.model),
            folder(snakemake.input.weights),
            params.layers,
            windows=windows_file(snakemake.input.windows),
            parts=folders(snakemake.input.get("restores") or []),
            source=snakemake.input.source or None,
        ),
        snakemake.output[0],
        Compute.named(given.device, params.dtype, params.batch_size, given.memory_bytes),
    )
