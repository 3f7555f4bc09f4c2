# Every number in one table, what the stages differ by, and a plot.
#   in:  all perplexity results with their per-window NLL
#   out: results/summary.csv, results/comparisons.csv, results/plots/perplexity.svg; of another configuration than
#        config.yaml, named after it: results/summary.mistral-7b.csv


localrules:
    summary,
    plot_perplexity,
    beside,


SCORES = [(name, *which, score) for name, e in EXPERIMENTS.items() for which, score in e.measuring.scores().items()]
MERGES = [(name, part, e.merge(part).source) for name, e in EXPERIMENTS.items() for part in e.merged_parts]


RESULTS = once(score.result for *_, score in SCORES)
WINDOW_SCORES = {score.result: score.window_scores for *_, score in SCORES}
RECORDS = once(merge for *_, merge in MERGES)


rule summary:
    input:
        results=list(RESULTS),
        windows=[WINDOW_SCORES[file] for file in RESULTS],
        merges=lambda wildcards: depends(*RECORDS),
        decided=all_decided,
    output:
        summary=f"results/summary{OF_CONFIG}.csv",
        comparisons=f"results/comparisons{OF_CONFIG}.csv",
    log:
        f"logs/summary{OF_CONFIG}.log",
    benchmark:
        f"benchmarks/summary{OF_CONFIG}.tsv"
    conda:
        "../envs/report.yaml"
    params:
        results=[[*named, RESULTS[score.result]] for *named, score in SCORES],
        merges=[[*named, RECORDS[merge]] for *named, merge in MERGES],
        code=code_of("summary"),
    script:
        "../workflow_scripts/summary.py"


BASELINES = {name: other for name in EXPERIMENTS if (other := baseline_of(CONFIG, name))}


# Of sweeps over seeds, means and standard deviations; of experiments with a baseline, the differences to it.
rule beside:
    input:
        summary=f"results/summary{OF_CONFIG}.csv",
        windows=[WINDOW_SCORES[file] for file in RESULTS],
    output:
        seeds=f"results/seeds{OF_CONFIG}.csv",
        baseline=f"results/baseline{OF_CONFIG}.csv",
    log:
        f"logs/beside{OF_CONFIG}.log",
    conda:
        "../envs/report.yaml"
    params:
        results=[[*named, RESULTS[score.result]] for *named, score in SCORES],
        sweeps={name: [member.base, dict(member.values)] for name, member in SWEEPS.items()},
        baselines=BASELINES,
        code=code_of("beside"),
    script:
        "../workflow_scripts/beside.py"


rule plot_training:
    input:
        lambda wildcards: [curve_of(training) for training in EXPERIMENTS[wildcards.experiment].trainings],
    output:
        report(
            "results/{experiment}/training.svg",
            caption="../report/training_still.rst",
            category="4 Training",
            labels={"page": "still"},
        ),
    log:
        "logs/plot_training/{experiment}.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        labels=lambda wildcards: EXPERIMENTS[wildcards.experiment].training_labels,
        code=code_of("plot_training"),
    script:
        "../workflow_scripts/plot_training.py"


rule plot_perplexity:
    input:
        f"results/summary{OF_CONFIG}.csv",
    output:
        report(
            f"results/plots/perplexity{OF_CONFIG}.svg",
            caption="../report/perplexity.rst",
            category="2 Stages",
            labels={"page": "still"},
        ),
    log:
        f"logs/plot_perplexity{OF_CONFIG}.log",
    benchmark:
        f"benchmarks/plot_perplexity{OF_CONFIG}.tsv"
    conda:
        "../envs/report.yaml"
    params:
        code=code_of("plot_perplexity"),
    script:
        "../workflow_scripts/plot_perplexity.py"


# On request, without running anything: what there would be, how large, and what is wrong.
rule check:
    log:
        f"logs/check{OF_CONFIG}.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        whole=CONFIG,
    script:
        "../workflow_scripts/check.py"


# On request: the table that a run ends with.
rule show:
    input:
        f"results/summary{OF_CONFIG}.csv",
    log:
        f"logs/show{OF_CONFIG}.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    script:
        "../workflow_scripts/show.py"


# On request: what `keep_activations` keeps can take many gigabytes. Results stay; a later adapter runs more layers.
rule drop_activations:
    log:
        "logs/drop_activations.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    shell:
        "rm -rf results/shared/activations results/shared/teacher_states results/shared/prefix_states results/shared/shards"
        " 2>{log}"


# On request: what lies in results/shared and is neither asked for by this configuration nor linked to by a result.
rule tidy:
    log:
        "logs/tidy.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        asked_for=PLAN.paths,
    script:
        "../workflow_scripts/tidy.py"
