"""One stage of a pruned model as a checkpoint of its own: planned, streamed, and put in place whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.descriptions import carried_prune_log, layers_map, make_prune_log, parameter_counts
from mistral_prune_lora.checkpoints.directories import BUNDLE_META, INDEX_FILE, LAYERS_MAP
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG, read_manifest
from mistral_prune_lora.checkpoints.tokenizer import copy_settings, local_tokenizer_files
from mistral_prune_lora.checkpoints.written import WEIGHTS, weights_entry
from mistral_prune_lora.console import progress
from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.exporting.plan import ExportPlan, plan_export
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE
from mistral_prune_lora.merging.arithmetic import exact_arithmetic
from mistral_prune_lora.merging.stream import InputDigests, stream_file
from mistral_prune_lora.merging.tensor_files import shard_index
from mistral_prune_lora.provenance import PACKAGE, file_sha256, other_files_sha256, versions
from mistral_prune_lora.storage.json_file import read_json, write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim
from mistral_prune_lora.storage.safetensors_file import FileDigests
from mistral_prune_lora.storage.space import require_space
from mistral_prune_lora.storage.transaction import atomic_directory

_GENERATION = "generation_config.json"
_DESCRIPTIONS = ("config.json", MANIFEST, PRUNE_LOG, BUNDLE_META, INDEX_FILE)
_SMALL_FILES = 64 << 20  # room for configuration and tokenizer beside the weights


def _recorded(content: dict) -> set[str] | None:
    """The files of an export by its record; None if it is no such record."""
    ours = content.get("command") == "export" and isinstance(content.get("outputs"), dict)
    return {*content["outputs"], "export.json"} if ours else None


RECORD = Record("export.json", "an export", _recorded)


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        output: the directory.
        layers: the stage's layers by their original indices; in stock form, a layer's place here is its new index.
        tensors: how many were written.
        nbytes: their size.
        remarks: what was left out or set right.
    """

    output: Path
    layers: tuple[int, ...]
    tensors: int
    nbytes: int
    remarks: tuple[str, ...]


def export_stage(
    model_path: str | Path,
    output_dir: str | Path,
    *,
    stage: str,
    bundles: Mapping[str, str | Path] | None = None,
    form: str = "stock",
    max_shard_size: int | None = None,
    tokenizer_path: str | Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write one stage of a pruned or merged model as a checkpoint that other software loads.

    Weights keep their bytes and are streamed; memory stays flat. Two forms:

    stock: a dense model of the stage's layers, numbered 0, 1, 2 ..., as transformers' own class saves it. Nothing in it
        tells of pruning but `export.json`, so every tool takes it for a dense model, ours too.
    stage_files: A with its original layer indices, manifest and prune_log.json, and each bundle that the stage has in a
        file of its own, stage2_layers_B.safetensors and stage3_layers_C.safetensors, for a server that loads them
        later: A has no such file, AB the first, FULL both.

    Args:
        model_path: an A model, a merged A, or a dense model, whose only stage is FULL.
        output_dir: written beside and renamed; a former export is replaced whole.
        stage: "A", "AB" or "FULL".
        bundles: directories by part, "B" and "C"; what the stage does not need is left out, and said.
        form: "stock" or "stage_files".
        max_shard_size: bytes in a weight file; None writes one file.
        tokenizer_path: whose tokenizer files are copied; None follows the chain of `tokenizer.find_tokenizer`.
        overwrite: replace what is no former export, too; never an input.

    Raises:
        LayoutError: a bundle that the stage needs is missing, or its layers are not the manifest's.
        CheckpointError: weights are missing, left over or quantised; an architecture that is not taken, or one that
            depends on layer numbers in a way that cannot be written out; weights that are not those that their record
            tells of; no tokenizer.
        PipelineError: see `outputs.claim`; there is no space. Nothing is written in any of these cases.
    """
    plan = plan_export(model_path, bundles or {}, stage=stage, form=form, max_shard_size=max_shard_size)
    model = plan.subject.model.path
    tokenizer = local_tokenizer_files(model, tokenizer_path=tokenizer_path)
    generation = next((f for f in (model / _GENERATION, model / "original_config" / _GENERATION) if f.is_file()), None)
    descriptions = _descriptions(plan, generation)
    read = [model, *(bundles or {}).values(), *(file.parent for file in tokenizer)]
    check = claim([Output.directory(output_dir, "--output_dir", RECORD)], read, overwrite=overwrite)
    require_space({Path(output_dir): plan.nbytes + _SMALL_FILES})
    try:
        with atomic_directory(output_dir, check=check) as fresh:
            inputs, written = _stream(plan, fresh, f"export {Path(output_dir).name}")
            for name, content in descriptions.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, fresh / name)
                else:
                    write_json(fresh / name, content)
            copy_settings(tokenizer, fresh)
            digests = _digests(plan, inputs, [*tokenizer, *([generation] if generation else [])])
            write_json(fresh / RECORD.name, _record(plan, fresh, digests, written))
    except OSError as error:
        raise PipelineError(
            f"the export cannot be written: {error.strerror}",
            where=output_dir,
            mend="free space there or choose another --output_dir; what was there before is untouched",
        ) from error
    report = ExportReport(Path(output_dir), plan.layers, len(plan.items), plan.nbytes, plan.remarks)
    _tell(plan, report)
    return report


def _stream(plan: ExportPlan, fresh: Path, description: str) -> tuple[InputDigests, dict[str, FileDigests]]:
    """Write the weights; returns what was seen of the inputs, and the digests of each file."""
    inputs, written = InputDigests(), {}
    with exact_arithmetic(), progress(total=plan.nbytes, description=description, unit="B") as bar:
        for name, items in plan.files.items():
            written[name] = stream_file(
                fresh / name, items, device=torch.device("cpu"), inputs=inputs, on_bytes=bar.update
            )
    return inputs, written


def _descriptions(plan: ExportPlan, generation: Path | None) -> dict[str, Mapping | Path]:
    """The descriptions beside the weights by file name: an object to write, or a file to copy."""
    files: dict[str, Mapping | Path] = {"config.json": plan.config.content}
    if plan.form == "stage_files":
        files = _of_pruned(plan)
    if generation:
        # A model that was saved for training says use_cache: false, which would make a server slow.
        settings = read_json(generation, CheckpointError, mend="fetch or write the model again")
        slow = settings.get("use_cache") is False
        files[_GENERATION] = {**settings, "use_cache": True} if slow else generation
    if index := shard_index(plan.weights):
        files[INDEX_FILE] = index
    return files


def _of_pruned(plan: ExportPlan) -> dict[str, Mapping | Path]:
    """The descriptions of an A that stays one: what was dropped from it, and which layer has which tensors."""
    model, layout = plan.subject.model, plan.subject.layout
    manifest = read_manifest(model.path) or {}
    selection = manifest.get("selection") or {}
    params = parameter_counts(layout, model.shapes, tied=plan.tied)
    made = make_prune_log(layout, model=manifest.get("base_model"), params=params, selection=selection)
    names = [item.spec.name for items in plan.weights.values() for item in items]
    return {
        "config.json": model.config | {"tie_word_embeddings": plan.tied},
        MANIFEST: model.path / MANIFEST,
        PRUNE_LOG: carried_prune_log(model.path / PRUNE_LOG, layout, made),
        LAYERS_MAP: layers_map(layout.num_layers, dict(zip(names, names, strict=True))),
    }


def _digests(plan: ExportPlan, inputs: InputDigests, small: Sequence[Path]) -> dict[str, str]:
    """The sha256 of every file that went in; CheckpointError if weights are not what their record says was written."""
    parts = [plan.subject.model, *plan.subject.bundles.values()]
    used = dict.fromkeys(item.entry.file for item in plan.items)
    read = {part.path: [file for file in used if file.parent == part.path] for part in parts}
    digests = inputs.finish(tuple(file for files in read.values() for file in files))
    for part in parts:
        part.check_files(read[part.path], digests.__getitem__)
    named = [part.path / name for part in parts for name in _DESCRIPTIONS]
    digests |= {file: file_sha256(file) for file in [*named, *small] if file.is_file()}
    return {os.fspath(file): digest for file, digest in digests.items()}


def _record(plan: ExportPlan, fresh: Path, digests: Mapping[str, str], written: Mapping[str, FileDigests]) -> dict:
    layout = plan.subject.layout
    stock = plan.form == "stock"
    return {
        "command": "export",
        "stage": plan.stage,
        "format": plan.form,
        "model": os.fspath(plan.subject.model.path),
        "bundles": {part: os.fspath(bundle.path) for part, bundle in plan.subject.bundles.items()},
        "dense_layers": layout.num_layers,
        "original_index": {str(new if stock else layer): layer for new, layer in enumerate(plan.layers)},
        "parts": {part: list(layout.layers_of(part)) for part in PARTS_OF_STAGE[plan.stage]},
        "config": {"cut": plan.config.cut, "written_out": plan.config.written_out} if stock else {},
        "tied_embeddings": plan.tied,
        "remarks": plan.remarks,
        "inputs": digests,
        "outputs": {name: digest.sha256 for name, digest in written.items()} | other_files_sha256(fresh, written),
        WEIGHTS: weights_entry(written),
        "versions": versions(PACKAGE, "torch", "transformers"),
    }


def _tell(plan: ExportPlan, report: ExportReport) -> None:
    for remark in report.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if plan.config.cut and plan.form == "stock":
        print(f"config.json: cut to the stage's layers: {', '.join(plan.config.cut)}", file=sys.stderr)
    print(
        f"{report.output}: stage {plan.stage} as {plan.form}, {len(report.layers)} layers {list(report.layers)};"
        f" {report.tensors} tensors, {report.nbytes / 1e6:.1f} MB",
        file=sys.stderr,
    )
