from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.pruning.importance import (
        angular_distances,
        last_token_states,
        write_importance,
    )
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, windows_file

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    windows = Windows.load(windows_file(snakemake.input.windows))
    windows.check_running_text("ranking blocks of layers")
    states = last_token_states(
        folder(snakemake.input.dense),
        windows.ids,
        beside=snakemake.output[0],
        compute=Compute.named(given.device, params.dtype, 4, given.memory_bytes),
    )
    table = angular_distances(
        states, params.drop, keep_last_layer=params.keep_last_layer, all_blocks=params.candidates == "all"
    )
    write_importance(table, snakemake.output[0])
