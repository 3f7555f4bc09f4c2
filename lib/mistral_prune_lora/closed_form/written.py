"""An adapter in closed form as it is written: a stock PEFT directory with its record and its model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from mistral_prune_lora.checkpoints.adapter import WEIGHTS_FILE
from mistral_prune_lora.checkpoints.pruning_identity import read_identity
from mistral_prune_lora.checkpoints.tensor_names import layer_prefix
from mistral_prune_lora.closed_form.correction import MODULE, Correction
from mistral_prune_lora.closed_form.solve import ClosedForm
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher_record import weight_digests
from mistral_prune_lora.distillation.unfinished import Unfinished
from mistral_prune_lora.layout.partition import spans
from mistral_prune_lora.provenance import PACKAGE, other_files_sha256, versions
from mistral_prune_lora.storage.dtypes import torch_name
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim, listed_files
from mistral_prune_lora.storage.transaction import atomic_directory

COMMAND = "closed_form"


def _recorded(content: dict) -> set[str] | None:
    ours = content.get("command") == COMMAND and isinstance(content.get("files"), list)
    return {str(name) for name in content["files"]} if ours else None


RECORD = Record("closed_form.json", "a calibration", _recorded)

_CARD = """---
library_name: peft
base_model: {base}
tags:
- lora
- layer-pruning
---

# LoRA adapter of part {part}, in closed form

Computed by {package} {version} without training, for layers {layers} (original indices) of a model that was cut into a
fast-starting part A and the restorable bundles B and C. What the missing layers did to the stream was regressed on what
enters `down_proj` of the layers below, and the solution is this adapter. {counted}

| layer | brings the stream to what enters layer | rank | ridge | left of what it lacked | on held-out tokens |
|---|---|---|---|---|---|
{rows}

Calibrated on:

{texts}

`closed_form.json` has the digests of everything that went in. The adapter's indices are those of the dense model: merge
it with `python -m mistral_prune_lora.pruning.mistral_merge_adapter`, or load it with PEFT onto {base}.
Its licence is that of the model it was made for.
"""

_COUNTED = {
    "inverse_norm": "A token's squared error, what is left of it below too, was divided by the length of the state that"
    "\nwas wanted there.",
    "equal": "All tokens counted alike.",
}


def write_closed_form(closed_form: ClosedForm, output_dir: str | Path, *, overwrite: bool = False) -> None:
    """Compute an adapter and write it; while it is computed, `NAME.unfinished` lies beside it.

    Args:
        closed_form: what is computed.
        output_dir: the adapter's directory, written whole or not at all.
        overwrite: replace what is no such adapter, too; never an input.

    Raises:
        PipelineError: the output may not or cannot be written, see `outputs.claim`; another process computes this
            adapter. Others as for `ClosedForm.corrections`.
    """
    student = closed_form.student
    read = [student.model_dir, *student.bundles, closed_form.dense_dir]
    check = claim([Output.directory(output_dir, "--output_dir", RECORD)], read, overwrite=overwrite)
    about = _about(closed_form)
    beside = Unfinished(output_dir, about)
    # Entered before the passes, which would be lost if their result could not be written.
    with beside.held():
        with atomic_directory(output_dir, check=check) as fresh:
            _write(fresh, closed_form.corrections(beside.path), student, about)
        beside.remove()


def _about(closed_form: ClosedForm) -> dict:
    """The record, but for what is found."""
    student, dense = closed_form.student, closed_form.dense_dir
    names = [os.fspath(folder) for folder in (student.model_dir, *student.bundles)]
    return {
        "command": COMMAND,
        "stage": closed_form.part,
        "student": {"dir": names[0], "weights": weight_digests(names[0])},
        "bundles": {name: weight_digests(name) for name in names[1:]},
        "pruning_identities": {name: read_identity(name) for name in names},
        "dense": {"dir": os.fspath(dense), "weights": weight_digests(dense)},
        "texts": [
            {**text.windows.identity.content(), "held_out": text.held_out, "weight": text.weight}
            for text in closed_form.texts
        ],
        "settings": asdict(closed_form.settings),
        "dtype": torch_name(closed_form.compute.dtype),
        "versions": versions(PACKAGE, "torch", "transformers", "peft"),
    }


def _write(folder: Path, corrections: Sequence[Correction], student: Student, about: Mapping) -> None:
    from peft import LoraConfig  # here, since the passes have no use for it

    layers, rank = [correction.layer for correction in corrections], len(corrections[0].a)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[MODULE.rpartition(".")[2]],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
        base_model_name_or_path=os.fspath(student.model_dir),
        inference_mode=True,
    )
    config.save_pretrained(os.fspath(folder))
    tensors: dict[str, torch.Tensor] = {}
    for correction in corrections:
        name = f"base_model.model.{layer_prefix(correction.layer)}{MODULE}"
        tensors |= {f"{name}.lora_A.weight": correction.a, f"{name}.lora_B.weight": correction.b}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    found = [correction.about for correction in corrections]
    (folder / "README.md").write_text(_card(about, found), encoding="utf-8")
    files = {"files": [*listed_files(folder), RECORD.name], "outputs": other_files_sha256(folder, ())}
    write_json(folder / RECORD.name, {**about, "layers": layers, "corrections": found, **files})


def _card(about: Mapping, found: Sequence[Mapping]) -> str:
    package, version = next(iter(about["versions"].items()))
    rows = [
        f"| {each['layer']} | {each['before']} | {each['rank']} | {each['ridge']:.1e} | {each['residual']:.3f} |"
        f" {'' if each['held_out_residual'] is None else format(each['held_out_residual'], '.3f')} |"
        for each in found
    ]
    texts = [
        f"- {text['windows'] - text['held_out']} windows of {text['seqlen']} tokens of {text['dataset']}"
        f" ({text['split']}), weight {text['weight']:g}; {text['held_out']} more to choose the ridge on"
        for text in about["texts"]
    ]
    return _CARD.format(
        base=about["student"]["dir"],
        part=about["stage"],
        package=package,
        version=version,
        layers=spans(each["layer"] for each in found),
        counted=_COUNTED[about["settings"]["token_weights"]],
        rows="\n".join(rows),
        texts="\n".join(texts),
    )
