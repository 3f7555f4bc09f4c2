from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.merging.plan import MergeSettings
    from mistral_prune_lora.merging.strength import write_strength
    from mistral_prune_lora.workflow.job import folder

with job(snakemake.log[0]):
    skeleton = folder(snakemake.input.skeleton) if snakemake.input.skeleton else None
    write_strength(
        folder(snakemake.input.base),
        folder(snakemake.input.adapter),
        snakemake.output[0],
        MergeSettings(skeleton=skeleton, adapter_indices=snakemake.params.adapter_indices),
    )
