from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.console import job
    from mistral_prune_lora.reporting.gathered import Told, gather
    from mistral_prune_lora.reporting.written import write_pages
    from mistral_prune_lora.results.summary import Named

files, params = snakemake.input, snakemake.params
with job(snakemake.log[0]):
    told = Told(
        params.experiments,
        params.whole,
        [(experiment, label, files.strengths[number]) for experiment, label, number in params.adapters],
        [(experiment, label, files.curves[number]) for experiment, label, number in params.trainings],
        {experiment: path for experiment, (path, _) in params.rankings.items()},
        params.made,
        params.of_config,
    )
    named = [Named(*names, path=files.results[number]) for *names, number in params.results]
    gathered = gather(files.summary, files.comparisons, named, told)
    write_pages(gathered, "benchmarks", dict(snakemake.output.items()))
