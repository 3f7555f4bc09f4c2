from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted
from mistral_prune_lora.pruning.importance import (
    angular_distances,
    last_token_states,
    write_importance,
)
from mistral_prune_lora.results.plots import plot_importance
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import make_windows

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    tokenizer = load_tokenizer(params.dense_dir)
    windows = make_windows(load_text(**params.dataset), tokenizer, seqlen=params.seqlen, max_windows=params.windows)
    states = last_token_states(
        params.dense_dir,
        windows.ids,
        beside=snakemake.output.table,
        compute=Compute.named(given.device, params.dtype, 4, given.memory_bytes),
    )
    table = angular_distances(
        states, params.drop, keep_last_layer=params.keep_last_layer, all_blocks=params.candidates == "all"
    )
    write_importance(table, snakemake.output.table)
    plot_importance(table, snakemake.output.plot)
