from mistral_prune_lora.console import job
from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.expansion import expand_experiments
from mistral_prune_lora.workflow.preview import preview

with job(snakemake.log[0]):
    print(preview(check_config(expand_experiments(snakemake.config).config, snakemake.params.schema)))
