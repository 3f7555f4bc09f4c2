"""What would train on something else than was asked for: refused, before anything long is run."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from tiny import save_tokenizer
from training_jobs import train_job

from mistral_prune_lora.distillation import loop as loop_module
from mistral_prune_lora.distillation.arguments import training_request
from mistral_prune_lora.distillation.prefix import prefix_states
from mistral_prune_lora.distillation.settings import (
    HiddenLoss,
    LoraSettings,
    LossSettings,
    OptimiserSettings,
)
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.errors import AdapterError, DataError, LayoutError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.mistral_optimized_kd_lora import main, parser
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows

LAYOUT = Layout(8, (3, 4), (5, 6))
F32 = Compute(torch.device("cpu"), torch.float32, 2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    dense = save_dense(folder / "dense", vocab_size=259, dtype=torch.float32)
    save_tokenizer(dense)
    return dense, *cut(dense, LAYOUT, folder, torch.float32)


def train(parts, output, part="B", **changes):
    dense, a, bundles = parts
    given = {
        "student_dir": a, "teacher_dir": dense, "windows": random_windows(6, 16), "output_dir": output,
        "bundles": {"A": (), "B": (bundles["B"],), "AB": (bundles["B"],)}[part], "dtype": torch.float32,
        "lora": LoraSettings(rank=2), "optimiser": OptimiserSettings(2, 2, 1, 1e-2, 1),
    }  # fmt: skip
    train_job(part, **given | changes)
    return output


def halved(windows: Windows) -> Windows:
    """The same ids in windows of half the length: in reading order they are the same."""
    ids = windows.ids.view(2 * len(windows), -1)
    identity = replace(windows.identity, seqlen=ids.shape[1], windows=len(ids))
    return Windows(ids, identity)


def test_states_of_windows_of_another_length_are_refused(parts, tmp_path):
    windows, (dense, a, bundles) = random_windows(6, 16), parts
    student = Student(a, (bundles["B"],))
    teacher_states(dense, windows, tmp_path / "teacher", compute=F32)
    prefix_states(student, 3, windows, tmp_path / "prefix", compute=F32)
    for states in ({"states": tmp_path / "teacher"}, {"prefix": tmp_path / "prefix"}):
        with pytest.raises(DataError, match="other windows"):
            train(parts, tmp_path / "adapter", windows=halved(windows), **states)
    assert not (tmp_path / "adapter").exists()


def test_there_is_no_prefix_below_layer_0(parts, tmp_path):
    with pytest.raises(DataError, match="the student runs no layer below layer 0"):
        prefix_states(Student(parts[1]), 0, random_windows(2, 16), tmp_path / "prefix", compute=F32)
    assert not (tmp_path / "prefix").exists()


@pytest.mark.parametrize(
    ("part", "changes", "error", "told"),
    [
        ("AB", {"adapt_layers": (2,)}, LayoutError, "names no layer of B, which AB trains too"),
        ("B", {"adapt_layers": (2, 3)}, LayoutError, r"names layers \[2\], which are not B's"),
        ("B", {"adapt_layers": ()}, LayoutError, "names no layer"),
        ("B", {"loss": LossSettings(hidden=HiddenLoss(2, 2))}, LayoutError, "layer 2 is none that the student runs at"),
        ("B", {"loss": LossSettings(hidden=HiddenLoss(5, 2))}, LayoutError, "layer 5 is none that the student runs at"),
        ("B", {"lora": LoraSettings(target_modules=("q_prj",))}, AdapterError, "there are no modules q_prj"),
        ("B", {"lora": LoraSettings(rank_pattern={"x": 1})}, AdapterError, "there are no modules x"),
        ("B", {"teacher_4bit": True}, PipelineError, "needs a GPU and bitsandbytes"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_run(
    parts, tmp_path, monkeypatch, part, changes, error, told
):
    monkeypatch.setattr(loop_module.Loop, "__init__", lambda *_: pytest.fail("began"))
    with pytest.raises(error, match=told):
        train(parts, tmp_path / "adapter", part, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_not_gone_on_with_under_another_configuration(tmp_path, capsys, monkeypatch):
    dense = save_dense(tmp_path / "dense", dtype=torch.float32)
    parts = dense, *cut(dense, LAYOUT, tmp_path, torch.float32)
    run = loop_module.Loop.run

    def interrupted(self):
        self._watch.save(self.state())
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(loop_module.Loop, "run", interrupted)
        train(parts, tmp_path / "adapter")
    assert loop_module.Loop.run is run
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    train(parts, tmp_path / "adapter")
    assert "of a training with another configs; this one begins anew" in capsys.readouterr().err


def test_a_loss_that_stays_high_is_trained_on_again(parts, tmp_path, monkeypatch):
    add = loop_module.Loop._add_gradients
    monkeypatch.setattr(loop_module.Loop, "_add_gradients", lambda s, b: add(s, b) * (50 if s.step >= 22 else 1))
    train(parts, tmp_path / "adapter", skip_spikes=3.0, optimiser=OptimiserSettings(60, 1, 1, 1e-3, 1))
    skipped = pd.read_csv(tmp_path / "adapter" / "training.csv").skipped
    assert skipped[22:30].all() and not skipped[45:].any()


def asked(*flags):
    return training_request(vars(parser().parse_args(flags)))


OURS = ("--stage", "A", "--student", "A", "--teacher", "dense", "--output_dir", "o", "--dataset", "pydoc")


def test_epochs_are_passes_over_the_text_whatever_the_number_of_processes(monkeypatch):
    request = asked(*OURS, "--epochs", "2", "--gradient_accumulation", "2")
    assert request.training(16).optimiser.steps == 16
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert request.training(16).optimiser.steps == 4
    assert "4 of 1 x 2 x 4 processes windows, 2.00 times the text" in request.told(16, 16)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--prefix_from", "f"), "no states are made"),
        (("--max_eval_samples", "4"), "--max_eval_samples without --eval_steps"),
        (("--patience", "4"), "--patience without --eval_steps"),
        (("--keep", "best"), "--keep without --eval_steps"),
        (("--hidden_loss", "1:1", "--teacher_states", "f"), "those of another layer are asked for too"),
        (("--teacher_4bit", "--teacher_states", "f"), "not of a quantised one"),
    ],
)
def test_flags_that_would_be_passed_over_are_refused(flags, told):
    with pytest.raises(PipelineError, match=told):
        asked(*OURS, *flags)


def test_several_processes_do_not_make_one_file(parts, tmp_path, capsys, monkeypatch):
    dense, a, bundles = parts
    (tmp_path / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = [
        "--stage", "B", "--teacher", str(dense), "--student", str(a), "--bundle", str(bundles["B"]), "--output_dir",
        str(tmp_path / "out"), "--text_file", str(tmp_path / "corpus.txt"), "--seqlen", "16", "--device", "cpu",
        "--dtype", "fp32", "--teacher_states", str(tmp_path / "states"),
    ]  # fmt: skip
    assert main(command) == 1
    assert "is not there yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
