from mistral_prune_lora.console import job
from mistral_prune_lora.workflow.tidy import tidy

with job(snakemake.log[0]):
    tidy("results/shared", snakemake.params.asked_for)
