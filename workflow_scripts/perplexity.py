from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.evaluation.jobs import RunInputs, StageOutputs, score_stage
    from mistral_prune_lora.evaluation.scoring import DenseAnswers
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    teacher = snakemake.input.get("teacher")
    score_stage(
        params.stage,
        RunInputs(
            folder(snakemake.input.model),
            folder(snakemake.input.weights),
            params.layers,
            windows=windows_file(snakemake.input.windows),
            parts=folders(snakemake.input.get("restores") or []),
            source=snakemake.input.get("source") or None,
        ),
        StageOutputs(
            snakemake.output.result, snakemake.output.windows, final_hidden=snakemake.output.get("final_hidden")
        ),
        Compute.named(given.device, params.dtype, params.batch_size, given.memory_bytes),
        dense=DenseAnswers(open_checkpoint(folder(snakemake.input.dense)), teacher) if teacher else None,
    )
