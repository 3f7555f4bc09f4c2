from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted_device
from mistral_prune_lora.distillation import teacher_states
from mistral_prune_lora.model import DTYPES
from mistral_prune_lora.windows import Windows

with job(snakemake.log[0]):
    teacher_states(
        snakemake.params.dense_dir,
        Windows.load(snakemake.input.windows),
        snakemake.output[0],
        dtype=DTYPES[snakemake.params.dtype],
        device=granted_device(snakemake.resources.get("gpu", 1)),
        batch_size=4,
        overwrite=True,
    )
