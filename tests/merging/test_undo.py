"""Bundles that put original bytes back: FULL is the dense model, however A and B were healed."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from cut_model import random_windows
from merge_oracle import (
    LAYOUT,
    LORA_OF_ALL,
    edit_json,
    edit_tensors,
    peft_merged,
    random_adapter,
    read_result,
    save_base,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.undo import UNDO_FILE
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.errors import CheckpointError, PipelineError
from mistral_prune_lora.evaluation.stages import evaluate_stages, stages_of
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.exporting.export import export_stage
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.models.load import load_model, restore_bundle
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge_command
from mistral_prune_lora.streaming.compute import Compute

DTYPES = [torch.float32, torch.bfloat16]
LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["down_proj"]}
CHANGED = 0  # the layer that A's adapter is confined to; the head is adapted too


@pytest.fixture(scope="module", params=DTYPES, ids=["fp32", "bf16"])
def healed(request, tmp_path_factory):
    """(dense model, pruned parts, merged parts that undo, their adapters, dtype)."""
    folder, dtype = tmp_path_factory.mktemp("undo"), request.param
    dense, parts = save_base(folder, dtype)
    of_a = LORA | {"target_modules": ["down_proj", "lm_head"]}
    adapters = {
        "A": random_adapter(folder / "lora_a", dense, of_a | {"layers_to_transform": [CHANGED]}, seed=1),
        "B": random_adapter(folder / "lora_b", dense, LORA | {"layers_to_transform": list(LAYOUT.b)}, seed=2),
    }
    merged = {part: folder / f"{part}_merged" for part in "ABC"}
    of_b = ["--undo_of", parts["A"], merged["A"], "--skeleton", parts["A"]]
    for part, more in (("A", []), ("B", of_b), ("C", ["--undo_of", parts["B"], merged["B"]])):
        adapter = ["--adapter_path", adapters[part]] if part in adapters else []
        told = ["--base_model", parts[part], *adapter, *more, "--output_dir", merged[part], "--device", "cpu"]
        assert merge_command([str(word) for word in told]) == 0
    return dense, parts, merged, adapters, dtype


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(random_windows(2, 12).ids.long()).logits


def stage_of(merged: dict[str, Path], stage: str, dtype: torch.dtype):
    return load_model(
        merged["A"], dtype=dtype, bundles=tuple(merged[part] for part in PARTS_OF_STAGE[stage] if part != "A")
    )


def test_the_undo_holds_the_original_bytes_of_what_the_merges_changed_and_nothing_else(healed):
    dense, _, merged, _, dtype = healed
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).state_dict()
    wanted = {
        "B": {f"model.layers.{CHANGED}.mlp.down_proj.weight", "lm_head.weight"},
        "C": {f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYOUT.b},
    }
    for part, names in wanted.items():
        held = load_file(merged[part] / UNDO_FILE)
        assert held.keys() == names
        assert all(torch.equal(held[name], original[name]) for name in names)
        told = json.loads((merged[part] / "bundle_meta.json").read_text())["undo"]
        assert told["tensors"].keys() == names
        assert told["bytes"] == sum(original[name].nbytes for name in names)


def test_full_is_the_dense_model_and_each_stage_is_pefts(healed):
    dense, _, merged, adapters, dtype = healed
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    assert torch.equal(logits(stage_of(merged, "FULL", dtype)), logits(original))
    # A: PEFT's merge of A's adapter, of which AB has nothing; AB: PEFT's merge of B's.
    for stage, part in (("A", "A"), ("AB", "B")):
        of_peft = peft_merged(dense, [adapters[part]], dtype)
        found = stage_of(merged, stage, dtype).state_dict()
        assert found and all(torch.equal(tensor, of_peft[name]) for name, tensor in found.items())


def test_switching_to_and_fro_gives_the_freshly_loaded_stage(healed):
    *_, merged, _, dtype = healed
    fresh = {stage: logits(stage_of(merged, stage, dtype)) for stage in PARTS_OF_STAGE}
    manager = DynamicStageManager(merged["A"], {part: merged[part] for part in "BC"}, dtype=dtype)
    for stage in ("AB", "A", "FULL", "AB", "FULL", "A"):
        manager.set_stage(stage)
        assert torch.equal(logits(manager.model), fresh[stage])
    model = load_model(merged["A"], dtype=dtype)
    for part, stage in (("B", "AB"), ("C", "FULL")):
        restore_bundle(model, merged[part])
        assert torch.equal(logits(model), fresh[stage])


@pytest.mark.parametrize("stage", PARTS_OF_STAGE)
def test_exports_hold_the_stage_with_what_is_put_back(healed, tmp_path, stage):
    dense, _, merged, _, dtype = healed
    bundles = {part: merged[part] for part in PARTS_OF_STAGE[stage] if part != "A"}
    export_stage(merged["A"], tmp_path / "stock", stage=stage, bundles=bundles)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=dtype)
    assert torch.equal(logits(exported), logits(stage_of(merged, stage, dtype)))
    if stage != "FULL":
        return
    whole = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    assert torch.equal(logits(exported), logits(whole))
    # A server that loads stage after stage gets to the dense model by loading every file over what it has.
    export_stage(merged["A"], tmp_path / "staged", stage=stage, bundles=bundles, form="stage_files")
    loaded = {}
    for name in ("model", "stage2_layers_B", "stage2_undo_B", "stage3_layers_C", "stage3_undo_C"):
        loaded |= load_file(tmp_path / "staged" / f"{name}.safetensors")
    assert loaded.keys() == whole.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.state_dict().items())


def test_the_streamed_stages_are_measured_with_what_is_put_back(healed, tmp_path):
    dense, parts, merged, _, dtype = healed
    windows, compute = random_windows(3, 12), Compute(torch.device("cpu"), dtype, 2)
    subject = Subject.open(merged["A"], {part: merged[part] for part in "BC"})
    results = evaluate_stages(subject, STAGES, windows, compute, work_dir=tmp_path / "merged")
    measured = {result.record["stage"]: result for result in results}
    (whole,) = evaluate_stages(Subject.open(dense), ["FULL"], windows, compute, work_dir=tmp_path / "dense")
    assert (measured["FULL"].scores.nll == whole.scores.nll).all()
    assert measured["FULL"].record["weights_sha256"] == whole.record["weights_sha256"]
    for stage, model in (
        ("A", merged["A"]),
        ("AB", parts["A"]),
    ):  # in the A before its merge, nothing is to be put back
        alone = Subject.open(model, {"B": merged["B"]})
        (alike,) = evaluate_stages(alone, [stage], windows, compute, work_dir=tmp_path / stage)
        assert alike.record["weights_sha256"] == measured[stage].record["weights_sha256"]
        assert (alike.scores.nll == measured[stage].scores.nll).all()


def test_bundles_that_undo_something_else_are_refused(healed, tmp_path):
    dense, parts, merged, _, dtype = healed
    other = random_adapter(tmp_path / "lora", dense, LORA | {"layers_to_transform": [CHANGED]}, seed=9)
    merge_adapters(parts["A"], [other], tmp_path / "A_merged", device="cpu")
    model = load_model(tmp_path / "A_merged", dtype=dtype)
    before = logits(model)
    for use in (
        partial(load_model, tmp_path / "A_merged", dtype=dtype, bundles=(merged["B"],)),
        partial(restore_bundle, model, merged["B"]),
        partial(export_stage, tmp_path / "A_merged", tmp_path / "out", stage="AB", bundles={"B": merged["B"]}),
        partial(stages_of, Subject.open(tmp_path / "A_merged", {"B": merged["B"]}), ["AB"]),
        partial(Student(tmp_path / "A_merged", (merged["B"],)).sources),
    ):
        with pytest.raises(CheckpointError, match="was made for other weights than those of"):
            use()
    assert torch.equal(logits(model), before)
    assert not (tmp_path / "out").exists()


def test_an_undo_that_is_not_what_was_written_is_refused(healed, tmp_path):
    _, _, merged, _, dtype = healed
    for edit, told in (
        (lambda undo: undo.unlink(), "No such file"),
        (lambda undo: undo.write_bytes(undo.read_bytes()[:-2] + b"\x01\x02"), "is not what"),
        (
            lambda undo: (undo.parent / "merge.json").unlink() or edit_tensors(undo, lambda t: t.popitem()),
            "differ about",
        ),
        (lambda undo: edit_json(undo.parent / "bundle_meta.json", undo=None), "does not say what undo.safetensors"),
    ):
        bundle = tmp_path / told.replace(" ", "_")
        shutil.copytree(merged["B"], bundle)
        edit(bundle / UNDO_FILE)
        with pytest.raises(CheckpointError, match=told):
            load_model(merged["A"], dtype=dtype, bundles=(bundle,))


def test_merges_carry_an_undo_on_and_refuse_one_that_cannot_be(healed, tmp_path):
    dense, parts, merged, adapters, dtype = healed
    twice = random_adapter(tmp_path / "lora", dense, LORA | {"layers_to_transform": list(LAYOUT.b)}, seed=5)
    merge_adapters(merged["B"], [twice], tmp_path / "twice", device="cpu")
    assert (tmp_path / "twice" / UNDO_FILE).read_bytes() == (merged["B"] / UNDO_FILE).read_bytes()
    # A bundle that becomes layers of the A model puts back what it brings along.
    whole = MergeSettings(skeleton=merged["A"], save_full_model=True)
    merge_adapters(merged["B"], [twice], tmp_path / "whole", settings=whole, device="cpu")
    expected, found = peft_merged(dense, [adapters["B"], twice], dtype), read_result(tmp_path / "whole")
    assert found and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    for base, undo_of, told in (
        (merged["B"], (parts["A"], merged["A"]), "there is an undo.safetensors already"),
        (parts["C"], (parts["A"], parts["A"]), "differs in nothing from"),
        (parts["B"], (parts["B"], merged["B"]), "is the bundle's own"),
        (parts["C"], (parts["B"], merged["A"]), "unlike"),
        (parts["A"], (parts["B"], merged["B"]), "only a bundle puts tensors back"),
    ):
        with pytest.raises(PipelineError, match=told):
            merge_adapters(base, [], tmp_path / "refused", settings=MergeSettings(undo_of=undo_of), device="cpu")
    assert not (tmp_path / "refused").exists()


def test_the_size_is_told_and_what_is_no_good_idea(healed, tmp_path, capfd):
    dense, parts, merged, _, _ = healed
    settings = MergeSettings(undo_of=(parts["A"], merged["A"]))
    merge_adapters(parts["B"], [], tmp_path / "few", settings=settings, device="cpu")
    told = capfd.readouterr().err
    assert "undo.safetensors: 2 original tensors" in told and "warning" not in told
    every = random_adapter(tmp_path / "lora", dense, LORA_OF_ALL | {"layers_to_transform": list(LAYOUT.kept)})
    merge_adapters(parts["A"], [every], tmp_path / "A_every", device="cpu")
    settings = MergeSettings(undo_of=(parts["A"], tmp_path / "A_every"))
    merge_adapters(parts["B"], [], tmp_path / "many", settings=settings, device="cpu")
    assert "reads it a second time" in capfd.readouterr().err
