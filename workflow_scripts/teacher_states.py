from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.distillation.teacher_states import teacher_states
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, windows_file

resources = snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    teacher_states(
        folder(snakemake.input.dense),
        Windows.load(windows_file(snakemake.input.windows)),
        snakemake.output[0],
        compute=Compute.named(given.device, snakemake.params.dtype, 4, given.memory_bytes),
        layer=snakemake.params.layer,
        overwrite=True,
    )
