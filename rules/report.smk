# What `snakemake --report report.html` puts together: pages of figures and tables that need nothing from outside.
#   in:  every table of the workflow, window scores, curves of trainings, adapters and the parts they are for
#   out: results/shared/strength/{made}.csv, results/report/*.html; of another configuration than config.yaml, named
#        after it: results/report.mistral-7b/*.html


localrules:
    report_pages,


ADAPTERS = [
    (name, f"{variant}.{part}", merge.strength)
    for name, e in EXPERIMENTS.items()
    for (variant, part), merge in e.labelled_merges.items()
    if merge.adapter
]
CURVES = [
    (name, label, curve_of(training))
    for name, e in EXPERIMENTS.items()
    for label, training in zip(e.training_labels, e.trainings)
]
STRENGTHS = once(table for *_, table in ADAPTERS)
TRAININGS = once(curve for *_, curve in CURVES)


# How much each adapter changes each weight: read from the adapter and its part, nothing is merged for it.
rule strength:
    input:
        base=lambda wildcards: depends(PLAN.merges[wildcards.made].base),
        adapter=lambda wildcards: depends(PLAN.merges[wildcards.made].adapter),
        skeleton=lambda wildcards: depends(*filter(None, [PLAN.merges[wildcards.made].skeleton])),
    output:
        "results/shared/strength/{made}.csv",
    log:
        "logs/strength/{made}.log",
    benchmark:
        "benchmarks/strength/{made}.tsv"
    wildcard_constraints:
        made=names(PLAN.merges),
    conda:
        "../envs/torch.yaml"
    resources:
        **granted(lambda wildcards: needs.of_strength(PLAN.merges[wildcards.made])),
    params:
        adapter_indices=lambda wildcards: PLAN.merges[wildcards.made].indices,
        code=code_of("strength"),
    script:
        "../workflow_scripts/strength.py"


rule report_pages:
    input:
        summary=f"results/summary{OF_CONFIG}.csv",
        comparisons=f"results/comparisons{OF_CONFIG}.csv",
        results=list(RESULTS),
        windows=[WINDOW_SCORES[file] for file in RESULTS],
        strengths=list(STRENGTHS),
        curves=list(TRAININGS),
    output:
        front=f"results/report{OF_CONFIG}/front.html",
        results=page("results", "what was measured", "1 Results"),
        stages=page("stages", "figures to hover over", "2 Stages"),
        layers=page("layers", "figures to hover over", "3 Layers"),
        training=page("training", "figures to hover over", "4 Training"),
        jobs=page("jobs", "time and memory", "5 Jobs"),
    log:
        f"logs/report_pages{OF_CONFIG}.log",
    benchmark:
        f"benchmarks/report_pages{OF_CONFIG}.tsv"
    conda:
        "../envs/report.yaml"
    params:
        results=[[*named, RESULTS[score.result]] for *named, score in SCORES],
        adapters=[[*named, STRENGTHS[table]] for *named, table in ADAPTERS],
        trainings=[[*named, TRAININGS[curve]] for *named, curve in CURVES],
        experiments={name: described(e) for name, e in EXPERIMENTS.items()},
        rankings=lambda wildcards: rankings(),
        made=PLAN.names,
        of_config=OF_CONFIG,
        whole=deciding(CONFIG),
        code=code_of("report_pages"),
    script:
        "../workflow_scripts/report_pages.py"


# What is left of a run for a report.
REPORT = [*STRENGTHS, *rules.report_pages.output]
