"""A trained adapter as it is written: a stock PEFT directory with its curve, its record and its model card.

Of parts that were trained together each gets a directory of its own, since each is merged by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel

from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX
from mistral_prune_lora.distillation.card import model_card
from mistral_prune_lora.distillation.curve import Table
from mistral_prune_lora.distillation.start import StartAdapter
from mistral_prune_lora.provenance import other_files_sha256
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Record, listed_files

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "training.csv", "training.json")


def _recorded(content: dict) -> set[str] | None:
    """The files of an adapter that was trained here by its record; None if it is no such record."""
    # A record that was written before records named their command is told by all that it holds.
    shape = {"stage", "layers", "student", "teacher", "windows", "settings", "versions"}
    if "command" not in content:
        return set(_ADAPTER_FILES) if shape <= content.keys() else None
    ours = content["command"] == "train" and isinstance(content.get("files"), list)
    return {str(name) for name in content["files"]} if ours else None


RECORD = Record("training.json", "training", _recorded)


def write_adapter(
    folder: Path,
    model: PeftModel,
    layers_by_part: Mapping[str, Sequence[int]],
    about: Mapping,
    curve: Table,
    held_out: Table,
    start: StartAdapter | None = None,
) -> None:
    """Write everything into a fresh directory.

    Args:
        folder: the directory.
        model: the student with its adapter.
        layers_by_part: the adapted layers of each part that was trained. Of a single one the adapter lies in `folder`
            itself, of several in `A_lora`, `B_lora` and `C_lora` below it.
        about: the record but for what only the files tell.
        curve, held_out: the tables; the second may have no rows.
        start: the adapter that a single part's training started from; the result holds it too.
    """
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    # PEFT holds the names in a set, whose order differs from process to process.
    config.target_modules = sorted(config.target_modules or ())
    if len(layers_by_part) == 1:
        model.save_pretrained(os.fspath(folder))
        if start:
            start.join(folder)
    else:
        for part, layers in layers_by_part.items():
            _save_part(model, layers, folder / f"{part}_lora")
    (folder / "training.csv").write_text(curve.text(), encoding="utf-8")
    looks = [dict(zip(held_out.columns, row, strict=True)) for row in held_out.rows]
    if looks:
        (folder / "held_out.csv").write_text(held_out.text(), encoding="utf-8")
    (folder / "README.md").write_text(model_card(about, looks), encoding="utf-8")
    files = {"files": [*listed_files(folder), RECORD.name], "outputs": other_files_sha256(folder, ())}
    write_json(folder / RECORD.name, {**about, **files})


def _save_part(model: PeftModel, layers: Sequence[int], folder: Path) -> None:
    """Write the adapter of some of the layers that it has, as PEFT writes one that has no others."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    everything, whole = config.layers_to_transform, model.state_dict()
    held = {name: tensor for name, tensor in whole.items() if "lora_" in name and _layer(name) in set(layers)}
    try:
        config.layers_to_transform = list(layers)
        model.save_pretrained(os.fspath(folder), state_dict=held)
    finally:
        config.layers_to_transform = everything
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, which says nothing; the one above speaks of all parts


def _layer(name: str) -> int | None:
    match = LAYER_PREFIX.search(name)
    return int(match[1]) if match else None
