# What was made, put into the folders of the experiments that it belongs to, as links that take no space.
#   in:  results/shared/...
#   out: results/{experiment}/pruning/, adapters/{part}_lora/, merged/{part}_merged/, ppl/{dataset}/{variant}.{stage}.*
# Each directory's made_from.json names what it is linked to.
for pruned_by, members in experiments_by(lambda e: e.pruning and e.pruning.rule):
    pruned_layout = EXPERIMENTS[members[0]].layout

    rule:
        name:
            f"place_{pruned_by}"
        input:
            lambda wildcards: EXPERIMENTS[wildcards.experiment].pruning.all_files,
        output:
            expand("results/{{experiment}}/pruning/A/{file}", file=[*MODEL_FILES, "prune.json"]),
            expand(
                "results/{{experiment}}/pruning/bundles/B/{file}", file=[*bundle_files(pruned_layout.b), "prune.json"]
            ),
            expand(
                "results/{{experiment}}/pruning/bundles/C/{file}", file=[*bundle_files(pruned_layout.c), "prune.json"]
            ),
        log:
            "logs/place/{experiment}.pruning.log",
        wildcard_constraints:
            experiment=names(members),
        localrule: True
        conda:
            "../envs/report.yaml"
        params:
            place=PLACE,
        shell:
            "{params.place} --made {input:q} --at {output:q} 2>{log:q}"


for adapter_part in "ABC":
    # An adapter that was trained has a curve, one in closed form has none.
    for kind, names_there in (
        ("trained", ("adapter_config.json", "adapter_model.safetensors", "training.csv", "training.json")),
        ("closed_form", ClosedForm.names),
    ):

        rule:
            name:
                f"place_adapter_{adapter_part}_{kind}"
            input:
                lambda wildcards: EXPERIMENTS[wildcards.experiment].made_adapter(wildcards.part).files,
            output:
                expand("results/{{experiment}}/adapters/{{part}}_lora/{file}", file=names_there),
            log:
                "logs/place/{experiment}.{part}_lora.log",
            wildcard_constraints:
                experiment=names(e.name for e in EXPERIMENTS.values() if adapter_part in getattr(e, f"{kind}_parts")),
                part=adapter_part,
            localrule: True
            conda:
                "../envs/report.yaml"
            params:
                place=PLACE,
            shell:
                "{params.place} --made {input:q} --at {output:q} 2>{log:q}"


for merged_part in "ABC":
    for merged_by, members in experiments_by(
        lambda e: e.merge(merged_part).rule if merged_part in e.merged_parts else None
    ):

        rule:
            name:
                f"place_{merged_by}"
            input:
                lambda wildcards: EXPERIMENTS[wildcards.experiment].merge(wildcards.part).files,
            output:
                expand(
                    "results/{{experiment}}/merged/{{part}}_merged/{file}",
                    file=EXPERIMENTS[members[0]].merge(merged_part).names,
                ),
            log:
                "logs/place/{experiment}.{part}_merged.log",
            wildcard_constraints:
                experiment=names(members),
                part=merged_part,
            localrule: True
            conda:
                "../envs/report.yaml"
            params:
                place=PLACE,
            shell:
                "{params.place} --made {input:q} --at {output:q} 2>{log:q}"


rule place_result:
    input:
        result=lambda wildcards: EXPERIMENTS[wildcards.experiment]
        .measuring.score(wildcards.variant, wildcards.dataset, wildcards.stage)
        .result,
        windows=lambda wildcards: EXPERIMENTS[wildcards.experiment]
        .measuring.score(wildcards.variant, wildcards.dataset, wildcards.stage)
        .window_scores,
    output:
        result="results/{experiment}/ppl/{dataset}/{variant}.{stage}.json",
        windows="results/{experiment}/ppl/{dataset}/{variant}.{stage}.parquet",
    log:
        "logs/place/{experiment}.{dataset}.{variant}.{stage}.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        place=PLACE,
    shell:
        "{params.place} --made {input.result:q} --at {output.result:q} 2>{log:q} && "
        "{params.place} --made {input.windows:q} --at {output.windows:q} 2>>{log:q}"
