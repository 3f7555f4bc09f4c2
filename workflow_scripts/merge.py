from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.merging.merge import merge_adapters
    from mistral_prune_lora.merging.plan import MergeSettings
    from mistral_prune_lora.workflow.job import folder, folders

with job(snakemake.log[0]):
    given = granted(snakemake.threads, snakemake.resources.get("gpu", 0), snakemake.resources.get("mem_mb"))
    merge_adapters(
        folder(snakemake.input.base),
        folders(snakemake.input.adapter),
        snakemake.output.record.removesuffix("/merge.json"),
        settings=MergeSettings(
            skeleton=folder(snakemake.input.skeleton) if snakemake.input.skeleton else None,
            adapter_indices=snakemake.params.adapter_indices,
            output_dtype=snakemake.params.output_dtype,
            undo_of=tuple(folders(snakemake.input.undo_of)) or None,
        ),
        device=given.device,
        overwrite=True,
    )
