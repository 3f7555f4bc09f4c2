# Layers chosen by what dropping them does, on request.
#   in:  the dense model, windows
#   out: results/shared/choice/{made}/, linked to as results/{experiment}/choice.csv, choice.json and choice.svg
# `layers: {choice: results/<experiment>/choice.json}` takes what was chosen. An experiment that waits for its choice is
# left out of everything else.


rule choose:
    input:
        dense=lambda wildcards: depends(PLAN.choices[wildcards.made].model),
        windows=lambda wildcards: depends(PLAN.choices[wildcards.made].windows.source),
    output:
        table="results/shared/choice/{made}/choice.csv",
        record="results/shared/choice/{made}/choice.json",
        plot="results/shared/choice/{made}/choice.svg",
    log:
        "logs/choose/{made}.log",
    benchmark:
        "benchmarks/choose/{made}.tsv"
    wildcard_constraints:
        made=names(PLAN.choices),
    conda:
        "../envs/torch.yaml"
    threads: COMPUTE_THREADS
    resources:
        **granted(lambda wildcards: needs.of_choice(PLAN.choices[wildcards.made])),
    params:
        settings=lambda wildcards: asdict(PLAN.choices[wildcards.made].settings),
        batch_size=lambda wildcards: PLAN.choices[wildcards.made].batch_size,
        dtype=lambda wildcards: PLAN.choices[wildcards.made].dtype,
        model=lambda wildcards: PLAN.choices[wildcards.made].model.identity,
        code=code_of("choose"),
    script:
        "../workflow_scripts/choose.py"


rule place_choice:
    input:
        table=lambda wildcards: f"{CHOICES[wildcards.experiment].folder}/choice.csv",
        record=lambda wildcards: f"{CHOICES[wildcards.experiment].folder}/choice.json",
        plot=lambda wildcards: f"{CHOICES[wildcards.experiment].folder}/choice.svg",
    output:
        table="results/{experiment}/choice.csv",
        record="results/{experiment}/choice.json",
        plot=report("results/{experiment}/choice.svg", caption="../report/choice.rst", category="Choice of layers"),
    log:
        "logs/place/{experiment}.choice.log",
    wildcard_constraints:
        experiment=names(CHOICES),
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        place=PLACE,
    shell:
        "{params.place} --made {input.table:q} --at {output.table:q} 2>{log:q} && "
        "{params.place} --made {input.record:q} --at {output.record:q} 2>>{log:q} && "
        "{params.place} --made {input.plot:q} --at {output.plot:q} 2>>{log:q}"
