from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.streaming.shards import Shard, gather_activations
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

    if not snakemake.input.shards:  # to gather them needs no model's classes
        from mistral_prune_lora.device import granted
        from mistral_prune_lora.evaluation.job_inputs import RunInputs
        from mistral_prune_lora.evaluation.jobs import run_segment
        from mistral_prune_lora.streaming.compute import Compute

files, params, resources = snakemake.input, snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    if files.shards:
        windows = Windows.load(windows_file(files.windows))
        gather_activations(files.shards, windows, params.batch_size, snakemake.output[0])
    else:
        given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
        run_segment(
            RunInputs(
                folder(files.model),
                folder(files.weights),
                params.layers,
                windows=windows_file(files.windows),
                source=files.source or None,
                parts=folders(files.get("restores") or []),
            ),
            snakemake.output[0],
            Compute.named(given.device, params.dtype, params.batch_size, given.memory_bytes),
            shard=Shard.named(snakemake.wildcards.get("shard")),
        )
