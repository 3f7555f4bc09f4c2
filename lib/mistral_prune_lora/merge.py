"""LoRA adapters merged into a model or a bundle: planned, streamed, checked, and put in place whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mistral_prune_lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from mistral_prune_lora.checkpoint import read_config
from mistral_prune_lora.console import progress
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.digest import file_sha256
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.json_file import write_json
from mistral_prune_lora.layout import INDEX_FILE, Layout, make_manifest, read_manifest
from mistral_prune_lora.merge_arithmetic import exact_arithmetic
from mistral_prune_lora.merge_plan import OUTPUT_DTYPES, MergePlan, plan_merge, shard_index
from mistral_prune_lora.merge_stream import InputDigests, stream_file
from mistral_prune_lora.merge_verify import FileCheck
from mistral_prune_lora.safetensors_file import DTYPES
from mistral_prune_lora.stopwatch import Stopwatch
from mistral_prune_lora.tokenizer import find_tokenizer, tokenizer_files
from mistral_prune_lora.transaction import atomic_directory, nearest_directory, refuse_foreign

ARITHMETIC = "PEFT merge_and_unload: 16-bit factors cast to float32, delta = (B @ A) * scaling, one rounding an adapter"
_SETTINGS = ("config.json", "manifest.json", "bundle_meta.json", INDEX_FILE)
_SMALL_FILES = 64 << 20  # room for configuration and tokenizer beside the weights


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
    device: str = "auto",
    skeleton: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    verify: bool = True,
    save_bundle_only: bool = False,
    save_full_model: bool = False,
    max_shard_size: int | None = None,
    output_dtype: str | None = None,
) -> MergeReport:
    """Merge adapters into an A model (a full model is written) or a bundle (layer files are written).

    The result has the bits that PEFT's merge_and_unload gives, adapter after adapter, on a model that was loaded with
    the dtype. Memory stays flat: tensors are streamed by blocks of rows, and checked behind the writer.

    Args:
        base_model: a directory with config.json, or a bundle directory.
        adapter_paths: PEFT LoRA adapters, merged in this order.
        output_dir: written beside and renamed; what was there before is replaced whole.
        device: where the arithmetic runs: "auto", "cpu" or "cuda:N".
        skeleton: for a bundle, the A model it belongs to; None means what the first adapter names as its base.
        tokenizer_path: whose tokenizer files a full model gets; None follows the chain of `tokenizer.find_tokenizer`.
        verify: check the result before it is put in place.
        save_bundle_only: write a model's kept layers as layer files.
        save_full_model: write skeleton and bundle as one model.
        max_shard_size: bytes in a weight file of a full model; None writes one file.
        output_dtype: "bf16", "fp16" or "fp32": what every float tensor of the base is cast to before anything is added;
            None leaves each in its own dtype.

    Raises:
        PipelineError and its kinds: see `merge_plan.plan_merge`; no space; no tokenizer; a weight is NaN or infinite,
            or becomes it by the cast or the merge; the check failed. Nothing is written then.
    """
    where = resolve_device(device)
    plan = plan_merge(
        base_model,
        adapter_paths,
        output_dir,
        skeleton=skeleton,
        save_bundle_only=save_bundle_only,
        save_full_model=save_full_model,
        max_shard_size=max_shard_size,
        output_dtype=output_dtype,
    )
    refuse_foreign(output_dir)
    small_files = _settings(plan, tokenizer_path) if plan.kind == "model" else []
    _require_space(Path(output_dir), plan.nbytes + _SMALL_FILES)
    inputs, written, verified, stopwatch = InputDigests(), {}, 0, Stopwatch()
    try:
        with atomic_directory(output_dir) as fresh:
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
            _write_descriptions(plan, fresh, small_files)
            _write_record(plan, fresh, inputs, written, small_files)
    except OSError as error:
        raise PipelineError(
            f"the merge cannot be written: {error.strerror}",
            where=output_dir,
            mend="free space there or choose another --output_dir; what was there before is untouched",
        ) from error
    merged = sum(bool(item.updates) for item in plan.items)
    strangers = sum(map(len, plan.out_of_scope.values()))
    report = MergeReport(
        Path(output_dir), merged, len(plan.items) - merged, strangers, verified, dict(stopwatch.seconds)
    )
    _tell(plan, report)
    return report


def _settings(plan: MergePlan, tokenizer_path) -> list[Path]:
    """Configuration and tokenizer files that a full model is written with."""
    model = plan.skeleton or plan.base
    named = [model.path / name for name in ("config.json", "generation_config.json")]
    place = find_tokenizer(model.path, tokenizer_path=tokenizer_path, adapter_path=plan.adapters[0].path)
    if isinstance(place, str):
        raise PipelineError(
            f"the tokenizer is only on the Hub, as {place}",
            where=model.path,
            mend="download it, and give its directory with --tokenizer_path",
        )
    return [file for file in named if file.is_file()] + tokenizer_files(place)


def _require_space(output: Path, nbytes: int) -> None:
    folder = nearest_directory(output.absolute().parent)
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise PipelineError(
            f"{nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=folder,
            mend="free space or choose another --output_dir",
        )


def _write_descriptions(plan: MergePlan, fresh: Path, small_files: Sequence[Path]) -> None:
    if plan.kind == "bundle":
        meta = {"layer_indices": list(plan.layers), "merged": True, "format": "safetensors", "granularity": "layer"}
        write_json(fresh / "bundle_meta.json", meta)
        return
    for file in small_files:
        shutil.copyfile(file, fresh / file.name)
    if plan.skeleton and plan.skeleton.config != read_config(plan.skeleton.path):
        # A skeleton that counts only its kept layers: the restored model counts all of them.
        write_json(fresh / "config.json", plan.skeleton.config)
    if plan.output_dtype:
        _write_dtype(fresh / "config.json", plan.output_dtype)
    if index := shard_index(plan):
        write_json(fresh / INDEX_FILE, index)
    model = plan.skeleton or plan.base
    manifest = read_manifest(model.path)
    if manifest is not None and plan.skeleton is None:
        shutil.copyfile(model.path / "manifest.json", fresh / "manifest.json")
    elif manifest is not None:
        write_json(fresh / "manifest.json", _with_restored(manifest, plan))


def _write_dtype(config_file: Path, output_dtype: str) -> None:
    """Let a configuration tell the dtype of the weights, under the name or names that it tells it by."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    dtype = str(DTYPES[OUTPUT_DTYPES[output_dtype]]).removeprefix("torch.")
    write_json(config_file, config | dict.fromkeys(names, dtype))


def _with_restored(manifest: dict, plan: MergePlan) -> dict:
    """The skeleton's manifest after the bundle's layers have become layers of A."""
    remaining = [tuple(i for i in part if i not in plan.layers) for part in (plan.layout.b, plan.layout.c)]
    return make_manifest(
        Layout(plan.layout.num_layers, *remaining),
        base_model=manifest.get("base_model", ""),
        model_type=manifest.get("model_type", ""),
        selection=manifest.get("selection", {}),
        artifacts=manifest.get("artifacts", {}),
    )


def _write_record(
    plan: MergePlan, fresh: Path, inputs: InputDigests, written: dict[str, str], small_files: Sequence[Path]
) -> None:
    digests = inputs.finish(plan.base.files + (plan.skeleton.files if plan.skeleton else ()))
    settings = [part.path / name for part in (plan.base, plan.skeleton) if part for name in _SETTINGS]
    digests |= {file: file_sha256(file) for file in [*settings, *small_files] if file.is_file()}
    others = {p.name: file_sha256(p) for p in sorted(fresh.iterdir()) if p.name not in written}
    merged = [item.spec.name for item in plan.items if item.updates]
    record = {
        "kind": plan.kind,
        "layers": list(plan.layers),
        "arithmetic": ARITHMETIC,
        "output_dtype": plan.output_dtype,
        "inputs": {os.fspath(path): digest for path, digest in digests.items()},
        "adapters": [
            {
                "path": os.fspath(adapter.path),
                "files": {p.name: file_sha256(p) for p in (adapter.path / CONFIG_FILE, adapter.path / WEIGHTS_FILE)},
                "settings": {key: adapter.config.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora")},
                "patterns": {key: adapter.config.get(key) for key in ("rank_pattern", "alpha_pattern")},
                "base_model_name_or_path": adapter.base_model,
                "out_of_scope": plan.out_of_scope.get(os.fspath(adapter.path), []),
            }
            for adapter in plan.adapters
        ],
        "tensors": {"merged": len(merged), "copied": len(plan.items) - len(merged)},
        "outputs": written | others,
        "versions": {name: importlib.metadata.version(name) for name in ("mistral-prune-lora", "torch")},
    }
    write_json(fresh / "merge.json", record)


def _tell(plan: MergePlan, report: MergeReport) -> None:
    strangers = f", {report.out_of_scope} adapter tensors out of scope" if report.out_of_scope else ""
    checked = f", {report.verified} values verified" if report.verified else ""
    print(
        f"{report.output}: {plan.kind} of layers {list(plan.layers)}; {report.merged} weights merged,"
        f" {report.copied} tensors copied{strangers}{checked}",
        file=sys.stderr,
    )
