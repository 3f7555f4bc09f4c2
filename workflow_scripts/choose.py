from pathlib import Path

from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.choosing.settings import ChoiceSettings
    from mistral_prune_lora.choosing.written import ChoiceJob
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, windows_file

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    ChoiceJob(
        folder(snakemake.input.dense),
        Windows.load(windows_file(snakemake.input.windows)),
        ChoiceSettings.of(params.settings),
        Compute.named(given.device, params.dtype, params.batch_size, given.memory_bytes),
        Path(snakemake.output.record).parent,
        {"name": snakemake.wildcards.made, "model": params.model},
    ).run(overwrite=True)
