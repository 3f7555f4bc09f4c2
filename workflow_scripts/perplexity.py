from mistral_prune_lora.console import job
from mistral_prune_lora.device import granted_device, granted_memory
from mistral_prune_lora.evaluation.stages import score_stage

params, resources = snakemake.params, snakemake.resources
with job(snakemake.log[0]):
    device = granted_device(resources.get("gpu", 1))
    score_stage(
        stage=params.stage,
        model_dir=params.model_dir,
        weights_dir=params.weights_dir,
        layers=params.layers,
        windows=snakemake.input.windows,
        source=snakemake.input.get("source") or None,
        result_json=snakemake.output.result,
        window_parquet=snakemake.output.windows,
        final_hidden=snakemake.output.get("final_hidden"),
        teacher_hidden=snakemake.input.get("teacher") or None,
        dense_dir=params.dense_dir,
        names=params.names,
        dtype=params.dtype,
        device=device,
        batch_size=params.batch_size,
        max_memory=granted_memory(resources.get("mem_mb"), device),
    )
