"""LoRA adapters merged into a model or a bundle: planned, streamed, checked, and put in place whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mistral_prune_lora.checkpoints.adapter import WEIGHTS_FILE
from mistral_prune_lora.checkpoints.adapter_config import CONFIG_FILE
from mistral_prune_lora.checkpoints.adapter_scope import merged_before
from mistral_prune_lora.checkpoints.directories import BUNDLE_META, INDEX_FILE, is_model_dir
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG
from mistral_prune_lora.checkpoints.pruning_identity import KEY
from mistral_prune_lora.checkpoints.tokenizer import copy_settings, local_tokenizer_files
from mistral_prune_lora.checkpoints.written import WEIGHTS, weights_entry
from mistral_prune_lora.console import progress
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.merging.arithmetic import exact_arithmetic
from mistral_prune_lora.merging.descriptions import describe_merge
from mistral_prune_lora.merging.plan import MergePlan, MergeSettings, plan_merge
from mistral_prune_lora.merging.stream import InputDigests, stream_file
from mistral_prune_lora.merging.undo import check_undo
from mistral_prune_lora.merging.verify import FileCheck
from mistral_prune_lora.provenance import PACKAGE, file_sha256, other_files_sha256, versions
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES, torch_name
from mistral_prune_lora.storage.json_file import read_json, read_json_if_there, write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim
from mistral_prune_lora.storage.safetensors_file import FileDigests
from mistral_prune_lora.storage.space import require_space
from mistral_prune_lora.storage.stopwatch import Stopwatch
from mistral_prune_lora.storage.transaction import atomic_directory

ARITHMETIC = "PEFT merge_and_unload: 16-bit factors cast to float32, delta = (B @ A) * scaling, one rounding an adapter"
_SETTINGS = ("config.json", MANIFEST, PRUNE_LOG, BUNDLE_META, INDEX_FILE)
_SMALL_FILES = 64 << 20  # room for configuration and tokenizer beside the weights


def _recorded(content: dict) -> set[str] | None:
    """The files of a merge by its record; None if it is no such record."""
    # A record that was written before records named their command is told by all that it holds.
    shape = {"kind", "layers", "arithmetic", "inputs", "adapters", "tensors", "outputs", "versions"}
    ours = content["command"] == "merge" if "command" in content else shape <= content.keys()
    return {*content["outputs"], "merge.json"} if ours and isinstance(content.get("outputs"), dict) else None


RECORD = Record("merge.json", "a merge", _recorded)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the directory.
        merged: weights that were changed.
        copied: tensors that were copied byte for byte.
        out_of_scope: adapter tensors that belong to layers this target does not hold.
        verified: values that were recomputed; 0 if the check was left out.
        seconds: where the time of the streamed weights went, by kind of work (see `stopwatch.Stopwatch`).
    """

    output: Path
    merged: int
    copied: int
    out_of_scope: int
    verified: int
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


def merge_adapters(
    base_model: str | Path,
    adapter_paths: Sequence[str | Path],
    output_dir: str | Path,
    *,
    settings: MergeSettings = MergeSettings(),
    device: str = "auto",
    tokenizer_path: str | Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> MergeReport:
    """Merge adapters into an A model (a full model is written) or a bundle (layer files are written).

    The result has the bits that PEFT's merge_and_unload gives, adapter after adapter, on a model that was loaded with
    the dtype. Memory stays flat: tensors are streamed by blocks of rows, and checked behind the writer.

    Args:
        base_model: a directory with config.json, or a bundle directory.
        adapter_paths: PEFT LoRA adapters, merged in this order.
        output_dir: written beside and renamed; a former merge is replaced whole.
        device: where the arithmetic runs: "auto", "cpu" or "cuda:N".
        settings: what is written, and how it is made.
        tokenizer_path: whose tokenizer files a full model gets; None follows the chain of `tokenizer.find_tokenizer`.
        verify: check the result before it is put in place.
        overwrite: replace what is no former merge, too; never an input.

    Raises:
        PipelineError and its kinds: see `plan.plan_merge` and `outputs.claim`; no space; no tokenizer; a weight
            is NaN or infinite, or becomes it by the cast or the merge; an input is not what its record says was
            written; the check failed. Nothing is written then.
    """
    where = resolve_device(device)
    plan = plan_merge(base_model, adapter_paths, settings)
    described = describe_merge(plan)
    small_files = _settings(plan, tokenizer_path) if plan.kind == "model" else []
    named = [adapter.base_model for adapter in plan.adapters if adapter.base_model and is_model_dir(adapter.base_model)]
    read = [
        base_model,
        *adapter_paths,
        settings.skeleton,
        tokenizer_path,
        *named,
        *(file.parent for file in small_files),
        *(settings.undo_of or ()),
    ]
    recheck = claim([Output.directory(output_dir, "--output_dir", RECORD)], read, overwrite=overwrite)
    if plan.undo:
        plan.undo.tell()
    require_space({Path(output_dir): plan.nbytes + _SMALL_FILES})
    inputs, verified, stopwatch = InputDigests(), 0, Stopwatch()
    written: dict[str, FileDigests] = {}
    try:
        with atomic_directory(output_dir, check=recheck) as fresh:
            with (
                exact_arithmetic(),
                progress(total=plan.nbytes, description=f"merge {Path(output_dir).name}", unit="B") as bar,
            ):
                for name, items in plan.files.items():
                    check = FileCheck(name, items) if verify else None
                    written[name] = stream_file(
                        fresh / name,
                        items,
                        device=where,
                        inputs=inputs,
                        on_bytes=bar.update,
                        compare=check,
                        stopwatch=stopwatch,
                    )
                    verified += check.finish(fresh / name) if check else 0
            if plan.undo:
                check_undo(plan.undo, fresh)
            _write_descriptions(plan, described, fresh, small_files)
            _write_record(plan, fresh, inputs, written, small_files)
    except OSError as error:
        raise PipelineError(
            f"the merge cannot be written: {error.strerror}",
            where=output_dir,
            mend="free space there or choose another --output_dir; what was there before is untouched",
        ) from error
    merged = sum(bool(item.updates) for item in plan.items)
    strangers = sum(map(len, plan.out_of_scope.values()))
    copied = len(plan.items) - merged - (len(plan.undo.items) if plan.undo else 0)
    report = MergeReport(Path(output_dir), merged, copied, strangers, verified, dict(stopwatch.seconds))
    _tell(plan, report)
    return report


def _settings(plan: MergePlan, tokenizer_path) -> list[Path]:
    """Configuration and tokenizer files that a full model is written with."""
    model = plan.skeleton or plan.base
    named = [model.path / name for name in ("config.json", "generation_config.json")]
    tokenizer = local_tokenizer_files(model.path, tokenizer_path=tokenizer_path, adapter_path=plan.adapters[0].path)
    # Carried over as they stand, so whether anything can be made of them is asked now and not of the merged model.
    return [file for file in named if read_json_if_there(file, CheckpointError) is not None] + tokenizer


def _write_descriptions(
    plan: MergePlan, described: Mapping[str, Mapping | Path], fresh: Path, small_files: Sequence[Path]
) -> None:
    copy_settings(small_files, fresh)
    for name, content in described.items():
        if isinstance(content, Path):
            shutil.copyfile(content, fresh / name)
        else:
            write_json(fresh / name, content)
    if plan.kind == "model" and plan.output_dtype:
        _write_dtype(fresh / "config.json", plan.output_dtype)


def _write_dtype(config_file: Path, output_dtype: str) -> None:
    """Let a configuration tell the dtype of the weights, under the name or names that it tells it by."""
    config = read_json(config_file, CheckpointError)
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    dtype = torch_name(COMPUTE_DTYPES[output_dtype])
    write_json(config_file, config | dict.fromkeys(names, dtype))


def _write_record(
    plan: MergePlan, fresh: Path, inputs: InputDigests, written: Mapping[str, FileDigests], small_files: Sequence[Path]
) -> None:
    undone = plan.undo.files if plan.undo else ()
    digests = inputs.finish((*(file for part in plan.parts for file in part.files), *undone))
    for part in plan.parts:
        part.check_files(digest=digests.__getitem__)
    if plan.undo and plan.undo.original:
        plan.undo.original.check_files(undone, digest=digests.__getitem__)
    settings = [part.path / name for part in (plan.base, plan.skeleton) if part for name in _SETTINGS]
    digests |= {file: file_sha256(file) for file in [*settings, *small_files] if file.is_file()}
    merged = [item.spec.name for item in plan.items if item.updates]
    put_back = len(plan.undo.items) if plan.undo else 0
    record = {
        "command": "merge",
        "kind": plan.kind,
        "layers": list(plan.layers),
        KEY: plan.identity,
        "arithmetic": ARITHMETIC,
        "output_dtype": plan.output_dtype,
        "inputs": {os.fspath(path): digest for path, digest in digests.items()},
        "adapters": [
            {
                "path": os.fspath(adapter.path),
                "files": {
                    CONFIG_FILE: file_sha256(adapter.path / CONFIG_FILE),
                    WEIGHTS_FILE: adapter.weights_sha256,
                },
                "settings": {key: adapter.config.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora")},
                "patterns": {key: adapter.config.get(key) for key in ("rank_pattern", "alpha_pattern")},
                "base_model_name_or_path": adapter.base_model,
                "indices": "original" if adapter.compact is None else "compact",
                "aliased_tensors": adapter.aliases,
                "out_of_scope": plan.out_of_scope.get(os.fspath(adapter.path), []),
            }
            for adapter in plan.adapters
        ],
        "merged_before": [entry for part in plan.parts for entry in merged_before(part.path).values()],
        "tensors": {"merged": len(merged), "copied": len(plan.items) - len(merged) - put_back}
        | ({"undo": put_back} if put_back else {}),
        "outputs": {name: digest.sha256 for name, digest in written.items()} | other_files_sha256(fresh, written),
        WEIGHTS: weights_entry(written),
        "versions": versions(PACKAGE, "torch"),
    }
    write_json(fresh / RECORD.name, record)


def _tell(plan: MergePlan, report: MergeReport) -> None:
    strangers = f", {report.out_of_scope} adapter tensors out of scope" if report.out_of_scope else ""
    checked = f", {report.verified} values verified" if report.verified else ""
    print(
        f"{report.output}: {plan.kind} of layers {list(plan.layers)}; {report.merged} weights merged,"
        f" {report.copied} tensors copied{strangers}{checked}",
        file=sys.stderr,
    )
