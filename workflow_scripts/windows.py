from pathlib import Path

from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.transaction import atomic_file
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import make_windows
from mistral_prune_lora.workflow.job import folder

params = snakemake.params
with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    text = load_text(**params.dataset)
    tokenizer = load_tokenizer(folder(snakemake.input.dense))
    windows = make_windows(text, tokenizer, seqlen=params.seqlen, max_windows=params.windows)
    windows.save(snakemake.output.windows)
    with atomic_file(snakemake.output.record) as fresh:
        write_json(Path(fresh), windows.identity.content())
