# Every number in one table, what the stages differ by, and a plot.
#   in:  all perplexity results with their per-window NLL
#   out: results/summary.csv, results/comparisons.csv, results/plots/perplexity.svg


localrules:
    summary,
    plot_perplexity,


rule summary:
    input:
        [result_files(experiment) for experiment in EXPERIMENTS],
    output:
        summary="results/summary.csv",
        comparisons="results/comparisons.csv",
    params:
        code=code_digest("summary"),
    log:
        "logs/summary.log",
    benchmark:
        "benchmarks/summary.tsv"
    conda:
        "../envs/report.yaml"
    script:
        "../workflow_scripts/summary.py"


rule plot_perplexity:
    input:
        "results/summary.csv",
    output:
        report("results/plots/perplexity.svg", caption="../report/perplexity.rst", category="Perplexity"),
    params:
        code=code_digest("plots"),
    log:
        "logs/plot_perplexity.log",
    benchmark:
        "benchmarks/plot_perplexity.tsv"
    conda:
        "../envs/report.yaml"
    script:
        "../workflow_scripts/plot_perplexity.py"
