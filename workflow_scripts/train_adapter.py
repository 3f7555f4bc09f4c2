from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.distillation.prepare import TrainingData
from mistral_prune_lora.distillation.settings import training_settings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.train import train_adapter
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows
from mistral_prune_lora.workflow.job import folder, folders, windows_file

files, settings = snakemake.input, snakemake.params.settings
with job(snakemake.log[0]):
    given = granted(snakemake.threads, snakemake.resources.get("gpu"), snakemake.resources.get("mem_mb"))
    train_adapter(
        snakemake.params.part,
        Student(folder(files.student), tuple(folders(files.bundles))),
        folder(files.dense),
        TrainingData(Windows.load(windows_file(files.windows)), files.teacher_states or None),
        snakemake.output.config.removesuffix("/adapter_config.json"),
        settings=training_settings(settings),
        compute=Compute.named(given.device, settings["dtype"]),
        overwrite=True,
    )
