"""What makes a number doubtful is said once, and stays with the number."""

import csv
import json
import shutil

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from evaluation_jobs import score_job
from evaluation_project import LAYOUT, evaluate
from tiny import save_tokenizer
from training_jobs import train_job

from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.distillation.settings import OptimiserSettings
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import make_windows

LONG = "windows of 64 tokens are longer than the 48 positions that the model was made for (max_position_embeddings)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model made for 48 positions, cut; its tokenizer, and one that gives other ids."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_dense(tmp_path / "dense", vocab_size=259, max_position_embeddings=48)
    save_tokenizer(tmp_path / "dense")
    cut(tmp_path / "dense", LAYOUT, tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} is about {i * i}." for i in range(60)))
    save_tokenizer(tmp_path / "strange")
    content = json.loads((tmp_path / "strange/tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "strange/tokenizer.json").write_text(json.dumps(content))
    return tmp_path


def measured(folder, *flags):
    """The command's results, its output and its warnings."""
    outputs = ["--json", "r.json", "--csv", "r.csv", "--bundles_dir", "bundles", "--text_file", "text.txt"]
    done = evaluate(folder, "--model_path", "A", *outputs, *flags)
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    return json.loads((folder / "r.json").read_text())["results"], done.out, said


def test_windows_longer_than_the_models_positions(folder):
    results, out, said = measured(folder, "--seqlen", "64")
    assert said == [f"warning: {LONG}"], "once, not for each stage"
    assert [r["warnings"] for r in results] == [[LONG]] * 3
    assert out.count(f"\nWarning: {LONG}: A[A], A[AB], A[ABC]\n") == 1
    rows = list(csv.DictReader((folder / "r.csv").open(encoding="utf-8")))
    assert [row["warnings"] for row in rows] == [LONG] * 3


def test_a_tokenizer_other_than_the_models(folder):
    results, out, said = measured(folder, "--seqlen", "48", "--tokenizer_path", "strange")
    doubt = f"the token ids are of the tokenizer {folder / 'strange'}, which is not the model's own, {folder / 'A'}"
    assert said == [f"warning: {doubt}"] and results[2]["warnings"] == [doubt] and f"Warning: {doubt}: A[A]" in out


def test_nothing_is_said_where_nothing_is_doubtful(folder):
    """Seqlen may equal the positions, and the dense model's tokenizer is A's, whoever saved it again."""
    shutil.copytree(folder / "dense", folder / "again")
    content = json.loads((folder / "again/tokenizer.json").read_text())
    (folder / "again/tokenizer.json").write_text(json.dumps(content, indent=1))
    for tokenizer in ([], ["--tokenizer_path", "dense"], ["--tokenizer_path", "again"]):
        results, out, said = measured(folder, "--seqlen", "48", *tokenizer)
        assert said == [] and [r["warnings"] for r in results] == [[]] * 3 and "arning" not in out


def test_jobs_and_training_keep_warnings_too(folder, capsys):
    text = load_text(text_files=[folder / "text.txt"])
    windows = make_windows(text, load_tokenizer(folder / "strange"), seqlen=64, max_windows=4)
    windows.save(folder / "w.safetensors")
    found = score_job(
        stage="A", model_dir=folder / "A", weights_dir=folder / "A", layers=LAYOUT.kept, source=None,
        windows=folder / "w.safetensors", result_json=folder / "r.json", window_parquet=folder / "r.parquet",
        dtype="fp32", device="cpu",
    )  # fmt: skip
    other = f"the token ids are of the tokenizer {folder / 'strange'}, which is not the model's own, {folder / 'A'}"
    assert json.loads((folder / "r.json").read_text())["warnings"] == found.record["warnings"] == [LONG, other]
    quick = OptimiserSettings(steps=1, batch_size=1, gradient_accumulation=1, warmup_steps=0)
    train_job(
        "A", student_dir=folder / "A", teacher_dir=folder / "dense", windows=windows, output_dir=folder / "adapter",
        optimiser=quick, dtype=torch.float32,
    )  # fmt: skip
    assert json.loads((folder / "adapter/training.json").read_text())["warnings"] == [LONG, other]
    assert capsys.readouterr().err.count(f"warning: {LONG}\nwarning: {other}\n") == 2


def test_a_model_without_a_tokenizer_has_none_to_differ_from(folder):
    shutil.copytree(folder / "A", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    random_windows(2, 32).save(folder / "w.safetensors")
    found = score_job(
        stage="A", model_dir=folder / "bare", weights_dir=folder / "bare", layers=LAYOUT.kept, source=None,
        windows=folder / "w.safetensors", result_json=folder / "r.json", window_parquet=folder / "r.parquet",
        dtype="fp32", device="cpu",
    )  # fmt: skip
    assert found.record["warnings"] == []
