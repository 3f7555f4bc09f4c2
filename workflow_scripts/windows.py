from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import make_windows

params = snakemake.params
with job(snakemake.log[0]):
    granted(snakemake.threads, 0, snakemake.resources.get("mem_mb"))
    text = load_text(**params.dataset)
    tokenizer = load_tokenizer(params.tokenizer_dir)
    make_windows(text, tokenizer, seqlen=params.seqlen, max_windows=params.windows).save(snakemake.output[0])
