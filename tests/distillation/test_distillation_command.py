"""The training command, from text to adapter; and a dense model that is named by its Hub id."""

import json

import datasets
import huggingface_hub
import pandas as pd
import pytest
from cut_model import cut, save_dense
from question_rows import save_questions
from safetensors.torch import load_file
from tiny import save_tokenizer

from mistral_prune_lora.checkpoints.manifest import read_manifest
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.mistral_optimized_kd_lora import main
from mistral_prune_lora.pruning.layeronly_drop import main as prune

LAYOUT = Layout(8, (3, 4), (5, 6))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's directory: dense/, A/, bundles/, corpus.txt."""
    dense = save_dense(tmp_path / "dense", vocab_size=259)
    save_tokenizer(dense)
    cut(dense, LAYOUT, tmp_path)
    (tmp_path / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*more, stage="A", teacher="./dense"):
    return main([
        "--stage", stage, "--teacher", teacher, "--student", "./A", "--output_dir", f"./{stage}_lora",
        "--text_file", "corpus.txt", "--seqlen", "32", "--nsamples", "8", "--steps", "2", "--batch_size", "2",
        "--gradient_accumulation", "1", "--warmup_steps", "0", "--device", "cpu", "--dtype", "fp32", *more,
    ])  # fmt: skip


def test_each_stage_is_trained_with_what_its_flags_say(folder, capsys):
    flags = ("--rank", "3", "--alpha", "6", "--target_modules", "q_proj,down_proj", "--use_rslora", "--kd_alpha", "0.7")
    assert train(*flags) == 0
    config = json.loads((folder / "A_lora/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, True)
    assert set(config["target_modules"]) == {"q_proj", "down_proj"}
    assert sorted(config["layers_to_transform"]) == [0, 1, 2, 7]
    told = json.loads((folder / "A_lora/training.json").read_text())
    assert told["settings"]["loss"]["kd_alpha"] == 0.7 and told["windows"]["windows"] == 8
    assert "./A_lora" in capsys.readouterr().out
    assert train("--bundle", "bundles/B", "--bundle", "bundles/C", stage="C") == 0
    held = {int(n.split(".layers.")[1].split(".")[0]) for n in load_file(folder / "C_lora/adapter_model.safetensors")}
    assert held == {5, 6}


def test_the_teachers_states_are_made_once_and_used_again(folder):
    assert train("--teacher_states", "states.safetensors") == 0
    made = (folder / "states.safetensors").stat().st_mtime_ns
    first = (folder / "A_lora/adapter_model.safetensors").read_bytes()
    assert train("--teacher_states", "states.safetensors") == 0
    assert (folder / "states.safetensors").stat().st_mtime_ns == made
    assert (folder / "A_lora/adapter_model.safetensors").read_bytes() == first


def ask(*more):
    return main([
        "--stage", "1", "--base_dir", "A", "--out_adapters", "adapters", "--teacher_model", "dense", "--use_kd",
        "--seq_len", "96", "--bs", "2", "--grad_acc", "1", "--device", "cpu", "--dtype", "fp32", *more,
    ])  # fmt: skip


def test_answers_are_learnt_from_questions_in_a_file(folder, capsys):
    save_questions(folder / "rows")
    assert ask("--qa_dataset", "rows/train-v2.0.json", "--max_samples", "3") == 0
    printed = capsys.readouterr().out
    assert "text:    3 of 3 windows of 96 tokens" in printed
    assert "answers: 18 tokens of 3 examples are learnt" in printed  # " blue", " green", " red", and what ends them
    written = folder / "adapters/A_lora/stageA/stageA"
    told = json.loads((written / "training.json").read_text())["windows"]
    assert told["examples"]["template"]["columns"] == {"answer": "answers.text"} and told["scored_sha256"]
    curve = pd.read_csv(written / "training.csv")
    assert len(curve) == 2 and curve.loss.notna().all()
    first = (written / "adapter_model.safetensors").read_bytes()
    files = ("--qa_dataset", "squad_v2=rows/rows.parquet", "--max_samples", "3", "--teacher_states", "states")
    assert ask(*files) == 0 and (written / "adapter_model.safetensors").read_bytes() != first
    assert "answers: 27 tokens of 3 examples are learnt" in capsys.readouterr().out  # " unanswerable" for " red"


def test_without_network_the_original_s_default_names_a_way_out(folder, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    assert ask() == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "the Hub cannot be reached" in line and "--qa_dataset squad=PATH" in line
    assert not (folder / "adapters").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--device", "cuda:5"), "--device cpu"),
        (("--student", "./nowhere"), "nowhere"),
        (("--seqlen", "5000"), "less than one window"),
        (("--bundle", "bundles/B"), "part A restores layers []"),
        (("--device", "meta"), "'meta' is not a device"),
        (("--target_modules", "q_proj, foo"), "no modules foo"),
        (("--output_dir", "."), "holds an input"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, capsys, more, told):
    assert train(*more) == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert told in line
    assert not (folder / "A_lora").exists()


def test_a_dense_model_may_be_named_by_its_hub_id(folder, monkeypatch):
    asked = []

    def snapshot_download(repo_id, **patterns):
        asked.append(repo_id)
        return str(folder / "dense")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    flags = ["--b_layers", "3", "--c_layers", "4", "--save_dir", "P/A", "--save_removed_dir", "P/bundles"]
    assert prune(["--model", "somebody/model", *flags]) == 0
    assert set(asked) == {"somebody/model"} and read_manifest("P/A")["base_model"] == "somebody/model"
    assert train(teacher="somebody/model") == 0


def test_a_pruned_model_is_no_teacher(folder, capsys):
    assert train(teacher="./A") == 1
    assert "the teacher is a pruned model: its manifest.json drops layers [3, 4, 5, 6]" in capsys.readouterr().err
    assert not (folder / "A_lora").exists()
