from dataclasses import fields
from pathlib import Path

from mistral_prune_lora.quick_imports import quick_imports

with quick_imports():
    from mistral_prune_lora.closed_form.settings import CalibrationText, ClosedFormSettings
    from mistral_prune_lora.closed_form.solve import ClosedForm
    from mistral_prune_lora.closed_form.written import write_closed_form
    from mistral_prune_lora.console import job
    from mistral_prune_lora.device import granted
    from mistral_prune_lora.distillation.student import Student
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.text.windows import Windows
    from mistral_prune_lora.workflow.job import folder, folders, windows_file

files, settings, resources = snakemake.input, snakemake.params.settings, snakemake.resources
with job(snakemake.log[0]):
    given = granted(snakemake.threads, resources.get("gpu"), resources.get("mem_mb"))
    # A single file is no list of files.
    records, stations = ([each] if isinstance(each, str) else each for each in (files.windows, files.stations))
    texts = [
        CalibrationText(Windows.load(windows_file(record)), settings["held_out"], weight)
        for record, weight in zip(records, snakemake.params.weights, strict=True)
    ]
    closed_form = ClosedForm(
        snakemake.params.part,
        Student(folder(files.student), tuple(folders(files.bundles))),
        folder(files.dense),
        texts,
        ClosedFormSettings(**{each.name: settings[each.name] for each in fields(ClosedFormSettings)}),
        Compute.named(given.device, settings["dtype"], settings["batch_size"], given.memory_bytes),
        [stations[n :: len(texts)] for n in range(len(texts))],
    )
    write_closed_form(closed_form, Path(snakemake.output.record).parent, overwrite=True)
