"""One model switched between stages is, at each, the model that a fresh load gives."""

import pytest
import torch
from cut_model import cut, random_windows, save_dense

from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, Layout
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.pruning.identity import PassLayer

LAYOUTS = [Layout(8, (3, 4), (5, 6)), Layout(8, (0, 5), (7,))]


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(random_windows(2, 12).ids.long()).logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_switch_gives_the_freshly_loaded_model(tmp_path, layout, dtype):
    a, bundles = cut(save_dense(tmp_path / "dense"), layout, tmp_path)
    fresh = {
        stage: logits(load_model(a, dtype=dtype, bundles=tuple(bundles[p] for p in parts if p != "A")))
        for stage, parts in PARTS_OF_STAGE.items()
    }
    assert not torch.equal(fresh["A"], fresh["AB"]) and not torch.equal(fresh["AB"], fresh["FULL"])
    manager = DynamicStageManager(a, bundles, dtype=dtype)
    assert manager.stage == "A" and torch.equal(logits(manager.model), fresh["A"])
    for stage in ("AB", "FULL", "A", "FULL", "AB", "A"):
        manager.set_stage(stage)
        assert manager.stage == stage and torch.equal(logits(manager.model), fresh[stage])


@pytest.fixture
def parts(tmp_path):
    return cut(save_dense(tmp_path / "dense"), LAYOUTS[0], tmp_path)


def test_generation_follows_the_stage(parts):
    a, bundles = parts
    manager = DynamicStageManager(a, bundles, dtype=torch.float32)
    ids = random_windows(1, 4).ids.long()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    for stage in ("FULL", "A", "AB"):
        manager.set_stage(stage)
        chosen = tuple(bundles[part] for part in PARTS_OF_STAGE[stage] if part != "A")
        expected = load_model(a, dtype=torch.float32, bundles=chosen).generate(ids, **settings)
        assert torch.equal(manager.model.generate(ids, **settings), expected)


def test_a_bundle_is_read_when_it_is_needed_and_once(parts, monkeypatch):
    from mistral_prune_lora.models import stage_manager

    read, restore = [], stage_manager.restore_layers
    monkeypatch.setattr(stage_manager, "restore_layers", lambda *args: read.append(args[1].path.name) or restore(*args))
    manager = DynamicStageManager(*parts, dtype=torch.float32)
    for stage in ("A", "AB", "A", "FULL", "AB", "FULL"):
        manager.set_stage(stage)
    assert read == ["B", "C"]


def test_a_bundle_that_was_not_given_is_asked_for(parts):
    a, bundles = parts
    manager = DynamicStageManager(a, {"B": bundles["B"]}, dtype=torch.float32)
    manager.set_stage("AB")
    before = logits(manager.model)
    with pytest.raises(LayoutError, match="bundle C was not given"):
        manager.set_stage("FULL")
    assert manager.stage == "AB" and torch.equal(logits(manager.model), before)
    with pytest.raises(LayoutError, match="there is no stage 'ABC'"):
        manager.set_stage("ABC")


def test_a_bundle_of_other_layers_is_refused(parts):
    a, bundles = parts
    manager = DynamicStageManager(a, {"B": bundles["C"], "C": bundles["B"]}, dtype=torch.float32)
    with pytest.raises(LayoutError, match=r"holds layers \[5, 6\] where the manifest gives \[3, 4\] to B"):
        manager.set_stage("AB")
    assert all(isinstance(manager.model.model.layers[i], PassLayer) for i in (3, 4, 5, 6))


def test_a_dense_model_has_every_stage(tmp_path):
    manager = DynamicStageManager(save_dense(tmp_path / "dense"), {}, dtype=torch.float32)
    before = logits(manager.model)
    manager.set_stage("FULL")
    assert torch.equal(logits(manager.model), before)
