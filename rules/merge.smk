# Adapters merged into their parts: a full model for A, layer files for the bundles.
#   in:  pruned parts, adapters (trained here or given)
#   out: results/{experiment}/merged/{A,B,C}_merged/, each with merge.json, the record of what went into it


rule merge_A:
    input:
        base=pruned_part_files,
        log=pruned_log,
        adapter=adapter_inputs,
    output:
        config="results/{experiment}/merged/{part}_merged/config.json",
        manifest="results/{experiment}/merged/{part}_merged/manifest.json",
        descriptions=expand(
            "results/{{experiment}}/merged/{{part}}_merged/{file}", file=["layers_map.json", "prune_log.json"]
        ),
        weights="results/{experiment}/merged/{part}_merged/model.safetensors",
        record="results/{experiment}/merged/{part}_merged/merge.json",
    log:
        "logs/merge_{part}/{experiment}.log",
    benchmark:
        "benchmarks/merge_{part}/{experiment}.tsv"
    wildcard_constraints:
        part="A",
    conda:
        "../envs/torch.yaml"
    params:
        base_dir=pruned_part_dir,
        adapter_dir=adapter_source_dir,
        adapter_indices=setting("adapter_indices"),
        output_dtype=setting("merge", "output_dtype"),
        code=code_digest("merging.merge"),
    script:
        "../workflow_scripts/merge.py"


for suffix, layout, members in layout_groups():
    for bundle in "BC":

        rule:
            name:
                f"merge_{bundle}{suffix}"
            input:
                base=pruned_part_files,
                adapter=adapter_inputs,
                skeleton=skeleton_manifest,
            output:
                layers=expand(
                    "results/{{experiment}}/merged/{{part}}_merged/{file}", file=bundle_files(layout.layers_of(bundle))
                ),
                record="results/{experiment}/merged/{part}_merged/merge.json",
            log:
                "logs/merge_{part}/{experiment}.log",
            benchmark:
                "benchmarks/merge_{part}/{experiment}.tsv"
            wildcard_constraints:
                experiment=members,
                part=bundle,
            conda:
                "../envs/torch.yaml"
            params:
                base_dir=pruned_part_dir,
                adapter_dir=adapter_source_dir,
                skeleton_dir=skeleton_dir,
                output_dtype=setting("merge", "output_dtype"),
                code=code_digest("merging.merge"),
            script:
                "../workflow_scripts/merge.py"
