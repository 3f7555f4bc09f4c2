# Every number in one table, what the stages differ by, and a plot.
#   in:  all perplexity results with their per-window NLL
#   out: results/summary.csv, results/comparisons.csv, results/plots/perplexity.svg


localrules:
    summary,
    plot_perplexity,


rule summary:
    input:
        results=[result_files(experiment, "json") for experiment in EXPERIMENTS],
        windows=[result_files(experiment, "parquet") for experiment in EXPERIMENTS],
        merges=[list(merge_records(experiment).values()) for experiment in EXPERIMENTS],
    output:
        summary="results/summary.csv",
        comparisons="results/comparisons.csv",
    log:
        "logs/summary.log",
    benchmark:
        "benchmarks/summary.tsv"
    conda:
        "../envs/report.yaml"
    params:
        merges={experiment: merge_records(experiment) for experiment in EXPERIMENTS},
        code=code_digest("results.summary"),
    script:
        "../workflow_scripts/summary.py"


rule plot_perplexity:
    input:
        "results/summary.csv",
    output:
        report("results/plots/perplexity.svg", caption="../report/perplexity.rst", category="Perplexity"),
    log:
        "logs/plot_perplexity.log",
    benchmark:
        "benchmarks/plot_perplexity.tsv"
    conda:
        "../envs/report.yaml"
    params:
        code=code_digest("results.plots"),
    script:
        "../workflow_scripts/plot_perplexity.py"


# On request: what `keep_activations` keeps can take many gigabytes. Results stay; a later adapter runs more layers.
rule drop_activations:
    log:
        "logs/drop_activations.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    shell:
        "rm -rf results/*/activations 2>{log}"
