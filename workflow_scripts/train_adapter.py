from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted_device
from mistral_prune_lora.distillation.train import LoraSettings, LossSettings, OptimiserSettings, train_adapter
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES
from mistral_prune_lora.text.windows import Windows

params = snakemake.params
with job(snakemake.log[0]):
    train_adapter(
        snakemake.wildcards.part,
        student_dir=params.student_dir,
        bundles=params.bundle_dirs,
        teacher_dir=params.dense_dir,
        states=snakemake.input.teacher_states or None,
        windows=Windows.load(snakemake.input.windows),
        output_dir=snakemake.output.config.removesuffix("/adapter_config.json"),
        lora=LoraSettings(**params.lora),
        loss=LossSettings(**params.loss),
        optimiser=OptimiserSettings(**params.optimiser),
        dtype=COMPUTE_DTYPES[params.dtype],
        device=granted_device(snakemake.resources.get("gpu", 1)),
        seed=params.seed,
        gradient_checkpointing=params.gradient_checkpointing,
        overwrite=True,
    )
