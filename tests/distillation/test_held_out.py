"""What a training is looked at by: held-out windows, the best adapter, patience, spikes, curves, loggers, the card."""

import json
import math
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from peft import PeftModel
from torch.nn import functional
from training_jobs import train_job

from mistral_prune_lora.distillation import loop as loop_module
from mistral_prune_lora.distillation.held_out import HeldOutScore
from mistral_prune_lora.distillation.settings import (
    HeldOutSettings,
    LoraSettings,
    LossSettings,
    OptimiserSettings,
)
from mistral_prune_lora.errors import DataError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.text.windows import windows_between

LAYOUT = Layout(8, (3, 4), (5, 6))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    dense = save_dense(folder / "dense", dtype=torch.float32)
    return dense, *cut(dense, LAYOUT, folder, torch.float32)


def train(parts, output, part="A", **changes):
    dense, a, bundles = parts
    given = {
        "student_dir": a, "teacher_dir": dense, "windows": random_windows(6, 16), "output_dir": output,
        "bundles": {"A": (), "B": (bundles["B"],)}[part], "dtype": torch.float32, "lora": LoraSettings(rank=2),
        "optimiser": OptimiserSettings(6, 2, 1, 1e-2, 1), "held_out_windows": random_windows(3, 16, seed=2),
        "held_out": HeldOutSettings(2),
    }  # fmt: skip
    train_job(part, **given | changes)
    return output


@pytest.mark.parametrize("part", ["A", "B"])
def test_the_last_look_is_what_transformers_says_of_the_written_adapter(parts, tmp_path, part):
    output, windows = train(parts, tmp_path / "adapter", part), random_windows(3, 16, seed=2)
    looks = pd.read_csv(output / "held_out.csv")
    assert looks.step.tolist() == [0, 2, 4, 6]
    bundles = (parts[2]["B"],) if part == "B" else ()
    student = PeftModel.from_pretrained(load_model(parts[1], dtype=torch.float32, bundles=bundles), output)
    dense, ids = load_model(parts[0], dtype=torch.float32), windows.ids.long()
    with torch.no_grad():
        z, q = (model(ids).logits[:, :-1].flatten(0, 1).double() for model in (student, dense))
    nll = functional.cross_entropy(z, ids[:, 1:].flatten()).item()
    kl = functional.kl_div(z.log_softmax(-1), q.log_softmax(-1), log_target=True, reduction="batchmean").item()
    last = looks.iloc[-1]
    assert last.mean_nll == pytest.approx(nll, rel=1e-5) and last.ppl == pytest.approx(math.exp(nll), rel=1e-5)
    assert last.kl == pytest.approx(kl, rel=1e-4)
    assert last.top1_agreement == pytest.approx((z.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_looking_changes_no_byte_of_the_adapter(parts, tmp_path):
    dropout = {"lora": LoraSettings(rank=2, dropout=0.2)}
    looked = train(parts, tmp_path / "looked", **dropout)
    alone = train(parts, tmp_path / "alone", held_out_windows=None, **dropout)
    assert (looked / "adapter_model.safetensors").read_bytes() == (alone / "adapter_model.safetensors").read_bytes()
    assert not (alone / "held_out.csv").exists()


def scores(monkeypatch, kls):
    """Let the looks find these divergences."""
    left = iter(kls)
    monkeypatch.setattr(loop_module.HeldOut, "score", lambda *_: HeldOutScore(1.0, next(left), 0.5))


def test_the_best_adapter_is_kept_if_asked_for(parts, tmp_path, monkeypatch):
    after_four = train(parts, tmp_path / "four", held_out=HeldOutSettings(4, "last"),
        optimiser=OptimiserSettings(6, 2, 1, 1e-2, 1))  # fmt: skip
    assert json.loads((after_four / "training.json").read_text())["kept_step"] == 6
    scores(monkeypatch, [5.0, 4.0, 1.0, 2.0])
    best = train(parts, tmp_path / "best", held_out=HeldOutSettings(2, "best"))
    scores(monkeypatch, [5.0, 4.0, 3.0, 2.0])
    last = train(parts, tmp_path / "last", held_out=HeldOutSettings(2, "best"))
    told = [json.loads((folder / "training.json").read_text())["kept_step"] for folder in (best, last)]
    assert told == [4, 6]
    assert (best / "adapter_model.safetensors").read_bytes() != (last / "adapter_model.safetensors").read_bytes()
    assert "the adapter after update 4" in (best / "README.md").read_text()


def test_patience_ends_a_training_that_gets_no_better(parts, tmp_path, monkeypatch):
    scores(monkeypatch, [5.0, 4.0, 6.0, 7.0, 1.0])
    output = train(parts, tmp_path / "adapter", held_out=HeldOutSettings(1, "best", 2))
    record = json.loads((output / "training.json").read_text())
    assert (record["kept_step"], record["ended_early"]) == (1, True)
    assert len(pd.read_csv(output / "training.csv")) == 3


def test_windows_that_are_trained_on_are_not_held_out(parts, tmp_path):
    windows = random_windows(6, 16)
    with pytest.raises(DataError, match="1 of 1 held-out windows are trained on, the first of them window 0"):
        train(parts, tmp_path / "adapter", windows=windows, held_out_windows=windows_between(windows, 4, 5))
    assert not (tmp_path / "adapter").exists()


def test_without_a_teacher_the_nll_decides_and_no_kl_is_told(parts, tmp_path):
    output = train(parts, tmp_path / "adapter", teacher_dir=None, loss=LossSettings(0.0))
    looks = pd.read_csv(output / "held_out.csv")
    assert looks.kl.isna().all() and looks.top1_agreement.isna().all() and looks.ppl.notna().all()
    assert "| kl" not in (output / "README.md").read_text()


def test_a_spike_is_left_out_counted_and_recorded(parts, tmp_path, monkeypatch):
    add, seen = loop_module.Loop._add_gradients, []

    def spoilt(self, batch):
        sums = add(self, batch)
        seen.append(self.step)
        return sums * 50 if self.step == 25 else sums

    monkeypatch.setattr(loop_module.Loop, "_add_gradients", spoilt)
    settings = {"optimiser": OptimiserSettings(30, 2, 1, 1e-3, 1), "held_out_windows": None}
    output = train(parts, tmp_path / "adapter", skip_spikes=3.0, **settings)
    curve = pd.read_csv(output / "training.csv")
    assert curve.skipped.tolist() == [int(step == 25) for step in range(30)]
    assert json.loads((output / "training.json").read_text())["skipped"] == 1
    assert "1 updates were left out as spikes" in (output / "README.md").read_text()
    taken = train(parts, tmp_path / "taken", **settings)
    assert (taken / "adapter_model.safetensors").read_bytes() != (output / "adapter_model.safetensors").read_bytes()


def test_an_error_names_the_update_and_its_windows(parts, tmp_path):
    with pytest.raises(PipelineError, match=r"of step 1 \(windows \d, \d\) is (inf|nan).*smaller learning rate"):
        train(parts, tmp_path / "adapter", loss=LossSettings(0.5, 1e300))


def test_loggers_are_told_every_update_and_look(parts, tmp_path, monkeypatch):
    told = []
    trackio = SimpleNamespace(
        init=lambda **about: told.append(("init", about["name"])),
        log=lambda values, step: told.append((step, sorted(values))),
        finish=lambda: told.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    train(parts, tmp_path / "adapter", loggers=["trackio"], held_out=HeldOutSettings(6))
    assert told[0] == ("init", "adapter") and told[-1] == "finish"
    steps = [entry[0] for entry in told[1:-1] if "loss" in entry[1]]
    assert steps == [1, 2, 3, 4, 5, 6] and (6, ["held_out/kl", "held_out/mean_nll", "held_out/ppl",
        "held_out/top1_agreement"]) in told  # fmt: skip


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_logger_that_is_not_installed_is_named_before_training(parts, tmp_path, monkeypatch, name):
    module = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PipelineError, match=f"the package {name} is not installed"):
        train(parts, tmp_path / "adapter", loggers=[name])
    assert not (tmp_path / "adapter").exists()


def test_the_card_says_what_was_done(parts, tmp_path):
    output = train(parts, tmp_path / "adapter", loss=LossSettings(0.9, 1.0, "js"))
    card, looks = (output / "README.md").read_text(), pd.read_csv(output / "held_out.csv")
    assert f"base_model: {parts[1]}" in card and "layers 0-2, 7 (original indices)" in card
    assert "| loss | 0.9 JS(teacher, student) + 0.1 cross-entropy |" in card
    assert "6 windows of 16 tokens" in card and "90 tokens scored" in card
    assert f"{looks.kl.iloc[-1]:.6g}" in card
    record = json.loads((output / "training.json").read_text())
    assert set(record["files"]) == {file.name for file in output.iterdir()}


def test_joint_training_writes_an_adapter_for_each_part(parts, tmp_path):
    dense, a, bundles = parts
    output = tmp_path / "joint"
    train_job(
        "AB", student_dir=a, teacher_dir=dense, windows=random_windows(6, 16), output_dir=output,
        bundles=(bundles["B"],), dtype=torch.float32, lora=LoraSettings(rank=2),
        optimiser=OptimiserSettings(3, 2, 1, 1e-2, 1),
    )  # fmt: skip
    student = load_model(a, dtype=torch.float32, bundles=(bundles["B"],))
    for part, layers in (("A", [0, 1, 2, 7]), ("B", [3, 4])):
        config = json.loads((output / f"{part}_lora" / "adapter_config.json").read_text())
        assert config["layers_to_transform"] == layers
        student = PeftModel.from_pretrained(student, output / f"{part}_lora").merge_and_unload()
    with torch.no_grad():
        logits = student(random_windows(2, 16).ids.long()).logits
        plain = load_model(a, dtype=torch.float32, bundles=(bundles["B"],))(random_windows(2, 16).ids.long()).logits
    assert not torch.equal(logits, plain)


def test_patterns_choose_modules_ranks_and_alphas(parts, tmp_path):
    lora = LoraSettings(2, target_modules=("mlp.*", "q_proj"), rank_pattern={"*gate*": 4}, alpha_pattern={"q_proj": 5})
    output = train(parts, tmp_path / "adapter", lora=lora)
    config = json.loads((output / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "q_proj"]
    assert config["rank_pattern"] == {"mlp.gate_proj": 4} and config["alpha_pattern"] == {"q_proj": 5}
    with pytest.raises(PipelineError, match=r"there are no modules attn\.\* in the layers"):
        train(parts, tmp_path / "other", lora=LoraSettings(2, target_modules=("attn.*",)))
