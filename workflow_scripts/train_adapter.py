from pathlib import Path

from mistral_prune_lora.console import job
from mistral_prune_lora.quick_imports import huge_pages, quick_imports
from mistral_prune_lora.workflow.together import log_of, share_of, shared_settings, start_together

with job(log_of(snakemake.log[0])):
    start_together(*map(snakemake.resources.get, ("processes", "nodes", "mpi")))
huge_pages()

with quick_imports():
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.distillation.prepare import TrainingData
    from mistral_prune_lora.distillation.settings import Running, training_settings
    from mistral_prune_lora.distillation.student import Student
    from mistral_prune_lora.distillation.train import TrainingJob, train_adapter
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

files, settings, resources = snakemake.input, snakemake.params.settings, snakemake.resources
with job(log_of(snakemake.log[0])):
    memory = resources.get("mem_mb")
    given = granted(share_of(snakemake.threads), resources.get("gpu"), memory and share_of(memory))
    loss = settings["loss"]
    states = (files.teacher_states or None, files.layer_states or None, files.prefix_states or None)
    held_out = None
    if files.held_out:
        stored = (files.held_out_teacher or None, None, files.held_out_prefix or None)
        held_out = TrainingData(Windows.load(windows_file(files.held_out)), *stored)
    loggers = [name for name in resources.get("loggers").split(",") if name != "none"]
    training = TrainingJob(
        snakemake.params.part,
        Student(folder(files.student), tuple(folders(files.bundles))),
        folder(files.dense) if loss["kd_alpha"] or loss["hidden"] else None,
        TrainingData(Windows.load(windows_file(files.windows)), *states),
        Path(snakemake.output.record).parent,
        training_settings(shared_settings(settings)),
        Compute.named(given.device, settings["dtype"], max_memory=given.memory_bytes),
        held_out,
        Running(resources.get("save_steps"), tuple(loggers)),
        folder(files.start) if files.start else None,
    )
    train_adapter(training, overwrite=True)
