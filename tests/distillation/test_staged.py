"""One adapter for several stages: each comes to what the whole model gives, and what cannot be is refused."""

import json

import pandas as pd
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from training_jobs import train_job

from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Batch
from mistral_prune_lora.distillation.settings import (
    HiddenLoss,
    LoraSettings,
    LossSettings,
    OptimiserSettings,
    TrainingSettings,
)
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.errors import LayoutError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.streaming.compute import Compute

LAYOUT = Layout(8, (3, 4), (5, 6))
SHARES = {"A": 1.0, "AB": 1.0, "FULL": 2.0}
QUICK = OptimiserSettings(steps=12, batch_size=2, gradient_accumulation=1, learning_rate=1e-2, warmup_steps=1)


@pytest.fixture
def parts(tmp_path):
    dense = save_dense(tmp_path / "dense", dtype=torch.float32)
    return dense, *cut(dense, LAYOUT, tmp_path, torch.float32)


def train(parts, output, part="A", bundles=("B", "C"), **changes):
    dense, a, held = parts
    settings = {"lora": LoraSettings(rank=4), "optimiser": QUICK, "loss": LossSettings(1.0, 1.0), "stages": SHARES}
    train_job(
        part, student_dir=a, teacher_dir=dense, windows=random_windows(4, 16), output_dir=output,
        bundles=[held[name] for name in bundles], dtype=torch.float32, **{**settings, **changes},
    )  # fmt: skip


def test_every_stage_comes_to_what_the_whole_model_gives(parts):
    _, a, bundles = parts
    student = Student(a, (bundles["B"], bundles["C"]))
    adapted = AdaptedStudent(
        student, (0, 1, 2, 7), TrainingSettings(LoraSettings(rank=2), stages=SHARES), Compute.named("cpu", "fp32")
    )
    ids = random_windows(2, 16).ids.long()
    with torch.no_grad():
        found, _ = adapted.finals(Batch(ids, None, None, ids[:, 1:]))
        assert [share for share, _ in found] == [0.25, 0.25, 0.5]
        for restored, (_, final) in zip(((), ("B",), ("B", "C")), found, strict=True):
            whole = load_model(a, dtype=torch.float32, bundles=tuple(bundles[part] for part in restored))
            assert torch.equal(final, whole.model(ids).last_hidden_state)
        # Stages leave the model as it was.
        assert torch.equal(adapted.model(ids).logits, whole(ids).logits)
    assert adapted._staged.layer_passes == 3 + 1 + 2 + 1 + 2 + 1


def test_it_comes_closer_at_all_stages_together(parts, tmp_path):
    train(parts, tmp_path / "shared", held_out_windows=random_windows(2, 16, seed=7))
    kl = pd.read_csv(tmp_path / "shared/training.csv").kl
    assert kl.iloc[-1] < kl.iloc[0]
    looks = pd.read_csv(tmp_path / "shared/held_out.csv")
    assert looks.kl.notna().all() and looks.kl.iloc[0] > 0
    told = json.loads((tmp_path / "shared/training.json").read_text())
    assert told["settings"]["stages"] == SHARES and set(told["bundles"]) == {str(b) for b in parts[2].values()}


def test_what_cannot_be_is_refused(parts, tmp_path):
    with pytest.raises(LayoutError, match="restores layers"):
        train(parts, tmp_path / "output", bundles=("B",))
    with pytest.raises(PipelineError, match="C's adapter is trained at one stage"):
        train(parts, tmp_path / "output", part="C")
    with pytest.raises(PipelineError, match="watched at one stage"):
        train(parts, tmp_path / "output", loss=LossSettings(1.0, 1.0, hidden=HiddenLoss(7, 7)))
    with pytest.raises(PipelineError, match="stages names 'BC'"):
        TrainingSettings(stages={"BC": 1})
