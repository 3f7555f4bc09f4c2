# Adapters merged into their parts: a full model for A, layer files for the bundles.
#   in:  pruned parts, adapters (trained here or given)
#   out: results/shared/merged/{made}/{A,B,C}_merged/, each with merge.json, the record of what went into it


for rule_name, merges in by_rule(PLAN.merges):

    checkpoint:
        name:
            rule_name
        input:
            base=lambda wildcards: depends(PLAN.merges[wildcards.made].base),
            adapter=lambda wildcards: depends(*filter(None, [PLAN.merges[wildcards.made].adapter])),
            skeleton=lambda wildcards: depends(*filter(None, [PLAN.merges[wildcards.made].skeleton])),
            undo_of=lambda wildcards: depends(*PLAN.merges[wildcards.made].undoes),
        output:
            weights=expand(
                "results/shared/merged/{{made}}/{part}_merged/{file}", part=merges[0].part, file=merges[0].names[:-1]
            ),
            record=f"results/shared/merged/{{made}}/{merges[0].part}_merged/merge.json",
        log:
            "logs/merge/{made}.log",
        benchmark:
            "benchmarks/merge/{made}.tsv"
        wildcard_constraints:
            made=names(merge.name for merge in merges),
        priority: HEALS
        conda:
            "../envs/torch.yaml"
        threads: STREAM_THREADS
        resources:
            **granted(lambda wildcards: needs.of_merge(PLAN.merges[wildcards.made])),
        params:
            adapter_indices=lambda wildcards: PLAN.merges[wildcards.made].indices,
            output_dtype=lambda wildcards: PLAN.merges[wildcards.made].output_dtype,
            code=code_of("merge"),
        script:
            "../workflow_scripts/merge.py"
