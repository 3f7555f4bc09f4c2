"""Distillation against plain autograd and PEFT: losses, gradients, whose layers are trained, what is written."""

import math

import pandas as pd
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from merge_oracle import edit_json
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training_jobs import train_job

from mistral_prune_lora.distillation import schedule
from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings, OptimiserSettings
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.errors import CheckpointError, DataError, LayoutError, NumberError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.streaming.compute import Compute

LAYOUT = Layout(8, (3, 4), (5, 6))
QUICK = OptimiserSettings(steps=3, batch_size=2, gradient_accumulation=1, learning_rate=1e-2, warmup_steps=1)


@pytest.fixture
def parts(tmp_path):
    dense = save_dense(tmp_path / "dense")
    a, bundles = cut(dense, LAYOUT, tmp_path)
    return dense, a, bundles


def train(parts, stage, output, **changes):
    dense, a, bundles = parts
    given = {"A": [], "B": [bundles["B"]], "C": [bundles["B"], bundles["C"]]}[stage]
    settings = {
        "student_dir": a, "teacher_dir": dense, "windows": random_windows(6, 16), "output_dir": output,
        "bundles": given, "lora": LoraSettings(rank=2), "optimiser": QUICK, "dtype": torch.float32,
    }  # fmt: skip
    train_job(stage, **{**settings, **changes})
    return output


@pytest.mark.parametrize(("stage", "layers"), [("A", {0, 1, 2, 7}), ("B", {3, 4}), ("C", {5, 6})])
def test_only_the_part_s_own_layers_are_adapted_and_peft_reads_the_result(parts, tmp_path, stage, layers):
    output = train(parts, stage, tmp_path / "adapter")
    weights = load_file(output / "adapter_model.safetensors")
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in weights} == layers
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name), "nothing was learnt"
    loaded = PeftModel.from_pretrained(load_model(parts[0], dtype=torch.float32), output)
    state = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert set(state) == set(weights) and all(torch.equal(state[n], weights[n]) for n in weights)
    curve = pd.read_csv(output / "training.csv")
    assert curve.step.tolist() == [1, 2, 3] and curve.learning_rate.iloc[1] == pytest.approx(QUICK.learning_rate)


def test_a_student_that_starts_as_the_dense_model_has_nothing_to_learn_from_it(tmp_path):
    """With every layer restored and alpha 1 the KL is that of a distribution with itself."""
    dense = save_dense(tmp_path / "dense")
    a, bundles = cut(dense, Layout(8, (3,), (4,)), tmp_path)
    output = train((dense, a, bundles), "C", tmp_path / "adapter", loss=LossSettings(1.0, 1.0))
    curve = pd.read_csv(output / "training.csv")
    assert curve.kl[0] == pytest.approx(0, abs=1e-6)


def test_training_brings_the_student_closer(parts, tmp_path):
    windows = random_windows(2, 16)
    settings = OptimiserSettings(steps=40, batch_size=2, gradient_accumulation=1, learning_rate=1e-2, warmup_steps=2)
    output = train(parts, "A", tmp_path / "adapter", windows=windows, optimiser=settings, loss=LossSettings(1.0, 1.0))
    kl = pd.read_csv(output / "training.csv").kl
    assert kl.iloc[-1] < 0.5 * kl.iloc[0]


def test_the_same_settings_give_the_same_bytes_with_stored_states_or_without(parts, tmp_path):
    first = train(parts, "A", tmp_path / "one")
    second = train(parts, "A", tmp_path / "two")
    teacher_states(parts[0], random_windows(6, 16), tmp_path / "states", compute=Compute.named("cpu", "fp32", 2))
    stored = train(parts, "A", tmp_path / "three", states=tmp_path / "states")
    other = train(parts, "A", tmp_path / "four", seed=1)
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / name).read_bytes() != (other / name).read_bytes()
    mine, theirs = load_file(first / name), load_file(stored / name)
    for key, tensor in mine.items():  # batches are cut otherwise, so the teacher's states differ in rounding
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-2, atol=1e-4)


def spoil(file, tensor, value):
    content = load_file(file)
    content[tensor][(1, 2)] = value
    save_file(content, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # B starts at zero, so the loss of the first step is that of the student; its gradient is beyond float32.
        ({"lora": LoraSettings(rank=2, alpha=1e38)}, r"the gradient's norm of step 1 \(windows 2, 4\) is (inf|nan)"),
        ({"loss": LossSettings(0.5, 1e300)}, "the loss of step 1 .* is (inf|nan)"),
        (
            {"optimiser": OptimiserSettings(1, 2, 1, 1e-2, 0, weight_decay=1e300)},
            "after 1 steps weights are NaN or inf",
        ),
    ],
)
def test_training_ends_where_a_number_is_none_and_writes_nothing(parts, tmp_path, changes, told):
    with pytest.raises(NumberError, match=told) as caught:
        train(parts, "A", tmp_path / "adapter", **changes)
    assert "nothing was written" in str(caught.value) and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("model.layers.2.mlp.up_proj.weight", math.nan),
        ("model.layers.2.self_attn.k_proj.weight", -math.inf),
        ("lm_head.weight", math.inf),
        ("lm_head.weight", -math.inf),
    ],
)
def test_no_adapter_comes_from_a_teacher_or_student_of_nan(parts, tmp_path, tensor, value):
    dense, a, _ = parts
    spoil(dense / "model.safetensors", tensor, value)
    with pytest.raises(NumberError, match=r"of step 1 .* is"):
        train(parts, "A", tmp_path / "adapter")
    if tensor != "lm_head.weight":  # which comes after the states
        with pytest.raises(NumberError, match=rf"tensor {tensor} holds NaN or infinity"):
            teacher_states(dense, random_windows(6, 16), tmp_path / "states", compute=Compute.named("cpu", "fp32"))
        assert not (tmp_path / "states").exists()
    save_dense(tmp_path / "sound")
    spoil(a / "model.safetensors", tensor, value)
    with pytest.raises(NumberError, match=r"of step 1 .* is"):
        train((tmp_path / "sound", a, parts[2]), "A", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_states_that_are_not_what_was_written_are_refused(parts, tmp_path):
    teacher_states(parts[0], random_windows(6, 16), tmp_path / "states", compute=Compute.named("cpu", "fp32", 4))
    content = bytearray((tmp_path / "states").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "states").write_bytes(content)
    with pytest.raises(DataError, match=r"window 5 is not the one that was written \(in .*states\)"):
        train(parts, "A", tmp_path / "adapter", states=tmp_path / "states")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (LoraSettings, "rank", [0, -1, 1.5, True, "4"]),
        (LoraSettings, "alpha", [0, -1.0, math.nan, math.inf, "8"]),
        (LoraSettings, "dropout", [1, -0.1, math.nan]),
        (LoraSettings, "target_modules", [(), ("",), "q_proj", ("q_proj", "q_proj"), (1,)]),
        (LossSettings, "kd_alpha", [-0.1, 1.1, math.nan, math.inf, None]),
        (LossSettings, "temperature", [0, -2.0, math.nan, math.inf]),
        (OptimiserSettings, "steps", [0, 10.0]),
        (OptimiserSettings, "batch_size", [0, -3]),
        (OptimiserSettings, "gradient_accumulation", [0]),
        (OptimiserSettings, "warmup_steps", [-1]),
        (OptimiserSettings, "learning_rate", [0, -1e-4, 1e30, math.nan, math.inf]),
        (OptimiserSettings, "weight_decay", [-0.1, math.nan]),
        (OptimiserSettings, "max_grad_norm", [0.0, -1.0, math.nan, math.inf]),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(kind, field, values):
    for value in values:
        with pytest.raises(PipelineError, match=rf"^{field} (is|names) "):
            kind(**{field: value})


def test_gradient_accumulation_is_the_larger_batch(parts, tmp_path):
    large = train(parts, "A", tmp_path / "large", optimiser=OptimiserSettings(2, 4, 1, 1e-2, 0))
    small = train(parts, "A", tmp_path / "small", optimiser=OptimiserSettings(2, 2, 2, 1e-2, 0))
    curves = [pd.read_csv(path / "training.csv") for path in (large, small)]
    assert curves[0].loss.tolist() == pytest.approx(curves[1].loss.tolist(), rel=1e-4)


def test_states_of_other_windows_or_another_teacher_are_refused(parts, tmp_path):
    teacher_states(parts[0], random_windows(6, 16, seed=7), tmp_path / "states", compute=Compute.named("cpu", "fp32"))
    with pytest.raises(DataError, match="other windows"):
        train(parts, "A", tmp_path / "adapter", states=tmp_path / "states")
    stranger = save_dense(tmp_path / "stranger", seed=3)
    teacher_states(stranger, random_windows(6, 16), tmp_path / "states", compute=Compute.named("cpu", "fp32"))
    with pytest.raises(DataError, match="another teacher"):
        train(parts, "A", tmp_path / "adapter", states=tmp_path / "states")
    teacher_states(parts[0], random_windows(6, 16), tmp_path / "states", compute=Compute.named("cpu", "bf16"))
    with pytest.raises(DataError, match="are bfloat16, and training computes in float32"):
        train(parts, "A", tmp_path / "adapter", states=tmp_path / "states")
    edit_json(parts[0] / "config.json", rms_norm_eps=0.1)
    with pytest.raises(DataError, match="another teacher"):
        train(parts, "A", tmp_path / "adapter", states=tmp_path / "states", dtype=torch.bfloat16)
    assert not (tmp_path / "adapter").exists()


def test_without_a_teacher_the_loss_is_cross_entropy_and_nothing_else_can_be_asked_for(parts, tmp_path):
    with pytest.raises(PipelineError, match="no teacher to learn from"):
        train(parts, "A", tmp_path / "adapter", teacher_dir=None, loss=LossSettings(0.1, 2.0))
    assert not (tmp_path / "adapter").exists()


def test_a_student_without_the_layers_of_its_stage_is_refused(parts, tmp_path):
    dense, _, bundles = parts
    for stage, given, missing in (("B", [], "3, 4"), ("C", [bundles["C"]], "3, 4"), ("C", [bundles["B"]], "5, 6")):
        with pytest.raises(LayoutError, match=missing):
            train(parts, stage, tmp_path / "adapter", bundles=given)
    with pytest.raises(LayoutError, match="restores"):
        train(parts, "A", tmp_path / "adapter", bundles=[bundles["B"]])
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        train(parts, "A", tmp_path / "adapter", student_dir=dense)


def test_every_window_is_seen_once_before_any_comes_again():
    updates = schedule.batches_of_updates(5, OptimiserSettings(batch_size=2, gradient_accumulation=1), seed=0)
    drawn = [window for _ in range(5) for batch in next(updates) for window in batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))


def test_the_learning_rate_rises_and_falls():
    settings = OptimiserSettings(steps=10, warmup_steps=4)
    shares = [schedule.rate_share(step, settings) for step in range(10)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[4:] == sorted(shares[4:], reverse=True) and 0 < shares[-1] < 0.1
