from pathlib import Path

from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.storage.json_file import write_json
    from mistral_prune_lora.storage.transaction import atomic_file
    from mistral_prune_lora.text.dataset_spec import DatasetSpec
    from mistral_prune_lora.text.dataset_windows import dataset_windows
    from mistral_prune_lora.text.windows import later_windows
    from mistral_prune_lora.workflow.job import folder

params = snakemake.params
with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    tokenizer = load_tokenizer(folder(snakemake.input.dense))
    spec = DatasetSpec.of(params.dataset)
    count = params.first + params.windows if params.windows else None
    windows = dataset_windows(spec, tokenizer, seqlen=params.seqlen, count=count)
    if params.first:
        windows = later_windows(windows, params.first)
    windows.save(snakemake.output.windows)
    with atomic_file(snakemake.output.record) as fresh:
        write_json(Path(fresh), windows.identity.content())
