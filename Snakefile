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
include: "rules/windows.smk"
include: "rules/prune.smk"
include: "rules/choose.smk"
include: "rules/distill.smk"
include: "rules/merge.smk"
include: "rules/export.smk"
include: "rules/perplexity.smk"
include: "rules/place.smk"
include: "rules/summary.smk"
include: "rules/report.smk"


CODE.keep()  # every rule has asked for its script's digest by now


# Every file that others are made from is named, not only the summary over them: a file that was deleted is made again,
# though what was made from it is there. Boundary activations and the teacher's states may be deleted; whatever is made
# from them names what they are made from.
rule all:
    default_target: True
    input:
        f"results/summary{OF_CONFIG}.csv",
        f"results/comparisons{OF_CONFIG}.csv",
        f"results/plots/perplexity{OF_CONFIG}.svg",
        [f"results/seeds{OF_CONFIG}.csv", f"results/baseline{OF_CONFIG}.csv"] if SWEEPS or BASELINES else [],
        PLAN.files,
        [experiment.files for experiment in EXPERIMENTS.values()],
        REPORT if CONFIG["report"] else [],
        all_decided,


onsuccess:
    from mistral_prune_lora.results.show import summary_table  # pandas, which no job has to wait for

    if Path(f"results/summary{OF_CONFIG}.csv").is_file():
        print(summary_table(f"results/summary{OF_CONFIG}.csv"))


onerror:
    from mistral_prune_lora.workflow.failures import failures

    for line in failures(log):
        print(line, file=sys.stderr)
