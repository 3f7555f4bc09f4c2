"""What an export will write, decided from headers alone and checked in full before the first byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.tensor_names import EMBEDDING, HEAD, LAYERS, NORM, layer_prefix
from mistral_prune_lora.checkpoints.undo import put_back, read_undo
from mistral_prune_lora.errors import CheckpointError, LayoutError, PipelineError
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.exporting.config import StageConfig, stage_config
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES
from mistral_prune_lora.merging.tensor_files import Item, TensorFiles, copied, split_files
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.models.ends import outside_entries
from mistral_prune_lora.storage.dtype_names import FLOATS
from mistral_prune_lora.storage.safetensors_file import TensorEntry
from mistral_prune_lora.streaming.record import tensors_sha256

FORMATS = ("stock", "stage_files")
STAGE_FILES = {"B": "stage2_layers_B.safetensors", "C": "stage3_layers_C.safetensors"}
UNDO_FILES = {"B": "stage2_undo_B.safetensors", "C": "stage3_undo_C.safetensors"}  # what restoring it puts back


@dataclass(frozen=True)
class ExportPlan(TensorFiles):
    """Everything an export does.

    Attributes:
        subject: the model and the bundles that the stage needs.
        stage: "A", "AB" or "FULL".
        form: "stock" or "stage_files".
        layers: the stage's layers, original indices, ascending; a layer's place among them is its new index.
        files: for each output file, its tensors.
        config: of the stage in stock form.
        tied: whether the head is the embedding, and no head is written.
        remarks: what was left out or set right, each a sentence without its full stop.
    """

    subject: Subject
    stage: str
    form: str
    layers: tuple[int, ...]
    files: dict[str, list[Item]]
    config: StageConfig
    tied: bool
    remarks: tuple[str, ...]

    @property
    def weights(self) -> dict[str, list[Item]]:
        """The files that are the model's own, without the files of stages that are loaded later."""
        return {
            name: items
            for name, items in self.files.items()
            if name not in (*STAGE_FILES.values(), *UNDO_FILES.values())
        }


def plan_export(
    model_path: str | Path,
    bundles: Mapping[str, str | Path],
    *,
    stage: str,
    form: str,
    max_shard_size: int | None,
) -> ExportPlan:
    """Decide what to write, and refuse what contradicts itself.

    Args and errors: as for `export.export_stage`.
    """
    if stage not in STAGES or form not in FORMATS:
        what = f"there is no stage {stage!r}" if stage not in STAGES else f"there is no format {form!r}"
        raise PipelineError(what, mend=f"Use one of {', '.join(STAGES)}, and of {', '.join(FORMATS)}")
    remarks: list[str] = []
    subject = _subject(model_path, bundles, stage, form, remarks)
    layers = subject.layout.active(stage)
    stored = {source.index: source.checkpoint.layer(source.index) for source in subject.sources(layers)}
    outside, tied = _outside(subject.model, remarks)
    stock = _items(outside, stored, {layer: new for new, layer in enumerate(layers)})
    _refuse_quantised(stock)
    dtypes = sorted({item.spec.dtype for item in stock})
    if len(dtypes) > 1:
        remarks.append(f"the weights are of several dtypes ({', '.join(dtypes)}); config.json names the model's own")
    config = stage_config(subject.model, layers, tied=tied, dtypes=dtypes)
    _check_stock(stock, config.content, subject.model)
    whole = form == "stock"
    files = split_files(stock, max_shard_size) if whole else _staged(subject, outside, stored, max_shard_size)
    return ExportPlan(subject, stage, form, layers, files, config, tied, tuple(remarks))


def _subject(
    model_path: str | Path, bundles: Mapping[str, str | Path], stage: str, form: str, remarks: list[str]
) -> Subject:
    """The model with those bundles that the stage needs, which hold exactly what the manifest says."""
    model = open_checkpoint(model_path)
    if model.kind != "model":
        raise CheckpointError("is a bundle, not a model", where=model_path, mend="give the A model, and this as bundle")
    if model.layout is None and (stage != "FULL" or bundles):
        raise LayoutError(
            f"there is no manifest.json, so nothing was dropped from this model: it has no stage {stage}"
            if stage != "FULL"
            else "there is no manifest.json, so no layer is missing that a bundle could restore",
            where=model.path,
            mend="give the A model that pruning or merging wrote, or export the dense model as FULL without bundles",
        )
    subject = Subject(model, {part: _bundle(path, part) for part, path in sorted(bundles.items())})
    layout = subject.layout
    if form == "stage_files" and not layout.dropped:
        raise LayoutError(
            "the model drops no layers, so there is nothing to load later",
            where=model.path,
            mend="give a pruned A model, or use --format stock",
        )
    for part, bundle in subject.bundles.items():
        if bundle.layers != layout.layers_of(part):
            raise LayoutError(
                f"holds layers {list(bundle.layers)}, and the manifest gives {list(layout.layers_of(part))} to {part}",
                where=bundle.path,
                mend=f"give the {part} bundle that was cut from {model.path}",
            )
    if strays := sorted(set(model.layers) & set(layout.dropped)):
        remarks.append(f"weights of the dropped layers {strays} in {model.path} are left out")
    unused = [part for part in subject.bundles if part not in PARTS_OF_STAGE[stage]]
    remarks += [f"the bundle {part} is no part of stage {stage} and is left out" for part in unused]
    kept = replace(subject, bundles={part: b for part, b in subject.bundles.items() if part not in unused})
    return kept if form == "stage_files" else kept.at(stage)


def _bundle(path: str | Path, part: str) -> Checkpoint:
    bundle = open_checkpoint(path)
    if bundle.kind != "bundle":
        raise CheckpointError("is a model, not a bundle", where=path, mend=f"give the directory of the {part} bundle")
    return bundle


def _outside(model: Checkpoint, remarks: list[str]) -> tuple[dict[str, TensorEntry], bool]:
    """(embedding, norm and, where it is another matrix than the embedding, head; whether it is the same).

    transformers takes a head that is there, whatever `tie_word_embeddings` says; others go by that word. So a head is
    written exactly if it differs or the model calls it untied, and the word is made true to what is written.
    """
    entries = outside_entries(model)
    unknown = [n for n in model.entries if n not in (EMBEDDING, NORM, HEAD) and not n.startswith(LAYERS)]
    if unknown:
        raise CheckpointError(
            f"holds {unknown[0]}, which a stock model of this family does not have",
            where=model.entries[unknown[0]].file,
            mend="export the model that this was made from",
        )
    if HEAD not in entries:
        return entries, True
    if not model_config(model).tie_word_embeddings:
        return entries, False
    if tensors_sha256({"": entries[HEAD]}) == tensors_sha256({"": entries[EMBEDDING]}):
        remarks.append(f"{HEAD} is the embedding once more and is left out")
        return {name: entry for name, entry in entries.items() if name != HEAD}, True
    remarks.append(
        f"config.json calls the head tied, but {HEAD} is not the embedding: it is written, and called untied"
    )
    return entries, False


def _refuse_quantised(items: Sequence[Item]) -> None:
    quantised = next((item.entry for item in items if item.spec.dtype not in FLOATS), None)
    if quantised:
        raise CheckpointError(
            f"{quantised.stored_name} is stored as {quantised.dtype}: quantised weights are not exported here",
            where=quantised.file,
            mend="export the unquantised model (float32, bfloat16 or float16)",
        )


def _staged(
    subject: Subject,
    outside: Mapping[str, TensorEntry],
    stored: Mapping[int, Mapping[str, TensorEntry]],
    max_shard_size: int | None,
) -> dict[str, list[Item]]:
    """A under its original layer numbers, and a file for each bundle that has layers."""
    numbers = {layer: layer for layer in stored}

    def of_part(part: str) -> dict[int, Mapping[str, TensorEntry]]:
        return {layer: stored[layer] for layer in subject.layout.layers_of(part)}

    files = split_files(_items(outside, of_part("A"), numbers), max_shard_size)
    held = [part for part in subject.bundles if subject.layout.layers_of(part)]
    files |= {STAGE_FILES[part]: _items({}, of_part(part), numbers) for part in held}
    put_back([subject.model, *subject.bundles.values()])  # or what is put back is of other weights
    undone = {UNDO_FILES[part]: read_undo(subject.bundles[part]) for part in held}
    return files | {name: copied(undo.entries) for name, undo in undone.items() if undo}


def _items(
    outside: Mapping[str, TensorEntry], stored: Mapping[int, Mapping[str, TensorEntry]], numbers: Mapping[int, int]
) -> list[Item]:
    """The tensors to write, from the embedding to the head, layers under new numbers."""
    named = {EMBEDDING: outside[EMBEDDING]} if outside else {}
    for layer, entries in stored.items():
        named |= {layer_prefix(numbers[layer]) + name: entry for name, entry in entries.items()}
    named |= outside
    return copied(named)


def _check_stock(items: Sequence[Item], config: Mapping, model: Checkpoint) -> None:
    """Raise unless the tensors are, name by name and shape by shape, those of transformers' own class."""
    settings = model_config(replace(model, config=dict(config)))
    with torch.device("meta"):
        wanted = {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(settings).state_dict().items()}
    if settings.tie_word_embeddings:
        wanted.pop(HEAD, None)
    there = {item.spec.name: item for item in items}
    missing = sorted(wanted.keys() - there.keys())
    misfit = [item for name, item in there.items() if wanted.get(name) != item.spec.shape]
    if not missing and not misfit:
        return
    if misfit:
        found = misfit[0]
        expected = wanted.get(found.spec.name)
        what = f"has {found.entry.stored_name} of shape {list(found.spec.shape)}, where {config['architectures'][0]}"
        what += f" has {list(expected)}" if expected else " has no such tensor"
        raise CheckpointError(what, where=found.entry.file, mend="use a model and bundles of one pruning")
    raise CheckpointError(
        f"lacks {len(missing)} tensors of {config['architectures'][0]}, first {missing[0]} (by new layer index)",
        where=model.path,
        mend="use a model and bundles of one pruning, complete",
    )
