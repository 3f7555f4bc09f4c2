from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings

with job(snakemake.log[0]):
    given = granted(snakemake.threads, snakemake.resources.get("gpu", 0), snakemake.resources.get("mem_mb"))
    merge_adapters(
        snakemake.params.base_dir,
        [snakemake.params.adapter_dir],
        snakemake.output.record.removesuffix("/merge.json"),
        settings=MergeSettings(
            skeleton=snakemake.params.get("skeleton_dir"),
            adapter_indices=snakemake.params.get("adapter_indices", "original"),
            output_dtype=snakemake.params.output_dtype,
        ),
        device=given.device,
        overwrite=True,
    )
