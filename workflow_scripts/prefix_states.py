from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.distillation.prefix import prefix_states
    from mistral_prune_lora.distillation.student import Student
    from mistral_prune_lora.distillation.train import FROZEN_BATCH
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

files, resources = snakemake.input, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    prefix_states(
        Student(folder(files.student), tuple(folders(files.bundles))),
        snakemake.params.first,
        Windows.load(windows_file(files.windows)),
        snakemake.output[0],
        compute=Compute.named(given.device, snakemake.params.dtype, FROZEN_BATCH, given.memory_bytes),
        start=files.start or None,
        overwrite=True,
    )
