from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings, OptimiserSettings, TrainingSettings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher import TeacherFiles
from mistral_prune_lora.distillation.train import train_adapter
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows

params = snakemake.params
with job(snakemake.log[0]):
    given = granted(snakemake.threads, snakemake.resources.get("gpu"), snakemake.resources.get("mem_mb"))
    train_adapter(
        snakemake.wildcards.part,
        Student(params.student_dir, tuple(params.bundle_dirs)),
        TeacherFiles(params.dense_dir, snakemake.input.teacher_states or None),
        Windows.load(snakemake.input.windows),
        snakemake.output.config.removesuffix("/adapter_config.json"),
        settings=TrainingSettings(
            LoraSettings(**params.lora),
            LossSettings(**params.loss),
            OptimiserSettings(**params.optimiser),
            seed=params.seed,
            gradient_checkpointing=params.gradient_checkpointing,
        ),
        compute=Compute.named(given.device, params.dtype),
        overwrite=True,
    )
