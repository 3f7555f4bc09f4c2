# Dense model in, summary.csv out: prune, distil, merge, measure.
from snakemake.utils import min_version

min_version("9.0")

# A --configfile replaces the built-in example; merged into it, the example would be run as well.
if not workflow.config_settings.configfiles:

    configfile: "config.yaml"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/inputs.smk"
include: "rules/dense.smk"
include: "rules/prune.smk"
include: "rules/distill.smk"
include: "rules/merge.smk"
include: "rules/export.smk"
include: "rules/perplexity.smk"
include: "rules/summary.smk"


# Every file that others are made from is named, not only the summary over them: Snakemake deletes what a failed job
# should have made, and would then find a summary that is newer than everything left and see nothing to do. Boundary
# activations and the teacher's states may be deleted; whatever is made from them names what they are made from.
rule all:
    default_target: True
    input:
        "results/summary.csv",
        "results/comparisons.csv",
        "results/plots/perplexity.svg",
        [made_files(experiment) for experiment in EXPERIMENTS],
        [merged_files(experiment) for experiment in EXPERIMENTS],
        [result_files(experiment, suffix) for experiment in EXPERIMENTS for suffix in ("json", "parquet")],
