from mistral_prune_lora.console import job
from mistral_prune_lora.workflow.preview import preview

with job(snakemake.log[0]):
    print(preview(snakemake.params.whole))
