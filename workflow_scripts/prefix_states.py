from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.distillation.schedule import FROZEN_BATCH
    from mistral_prune_lora.streaming.shards import Shard, gather_activations
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

    if not snakemake.input.shards:  # to gather them needs no model's classes
        from mistral_prune_lora.device import granted
        from mistral_prune_lora.distillation.prefix import prefix_states
        from mistral_prune_lora.distillation.student import Student
        from mistral_prune_lora.streaming.compute import Compute

files, resources = snakemake.input, snakemake.resources
with job(snakemake.log[0]):
    windows = Windows.load(windows_file(files.windows))
    if files.shards:
        gather_activations(files.shards, windows, FROZEN_BATCH, snakemake.output[0])
    else:
        given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
        prefix_states(
            Student(folder(files.student), tuple(folders(files.bundles))),
            snakemake.params.first,
            windows,
            snakemake.output[0],
            compute=Compute.named(given.device, snakemake.params.dtype, FROZEN_BATCH, given.memory_bytes),
            start=files.start or None,
            overwrite=True,
            shard=Shard.named(snakemake.wildcards.get("shard")),
        )
