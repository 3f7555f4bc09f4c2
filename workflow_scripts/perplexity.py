from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.evaluation.gathering import gather_scores
    from mistral_prune_lora.evaluation.job_inputs import RunInputs, StageOutputs
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

    if not snakemake.input.shards:  # to gather them needs no model's classes
        from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
        from mistral_prune_lora.device import granted
        from mistral_prune_lora.evaluation.jobs import score_shard, score_stage
        from mistral_prune_lora.evaluation.scoring import DenseAnswers
        from mistral_prune_lora.streaming.compute import Compute
        from mistral_prune_lora.streaming.shards import Shard

files, made, params, resources = snakemake.input, snakemake.output, snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    inputs = RunInputs(
        folder(files.model),
        folder(files.weights),
        params.layers,
        windows=windows_file(files.windows),
        source=files.get("source") or None,
        parts=folders(files.get("restores") or []),
    )
    outputs = StageOutputs(made.result, made.get("windows"), final_hidden=made.get("final_hidden"))
    if scores := [file for file in files.shards if file.endswith(".json")]:
        gather_scores(params.stage, inputs, outputs, scores, params.batch_size)
    else:
        given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
        compute = Compute.named(given.device, params.dtype, params.batch_size, given.memory_bytes)
        teacher = files.get("teacher")
        dense = DenseAnswers(open_checkpoint(folder(files.dense)), teacher) if teacher else None
        if shard := Shard.named(snakemake.wildcards.get("shard")):
            score_shard(params.stage, inputs, outputs, compute, shard=shard, dense=dense)
        else:
            score_stage(params.stage, inputs, outputs, compute, dense=dense)
