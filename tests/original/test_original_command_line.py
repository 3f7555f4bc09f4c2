"""The original trainer's command lines, as they are typed, through the guide's merges to the guide's evaluation."""

import json

import pandas as pd
import pytest
from cut_model import cut, save_dense
from evaluation_project import LAYOUT, MERGED, PRUNED, evaluate
from question_rows import save_questions
from safetensors.torch import load_file
from tiny import save_tokenizer

from mistral_prune_lora.mistral_optimized_kd_lora import main as train
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge

ADAPTERS = "./mistral_kd_lora_results/adapters"
NESTED = {"A": "A_lora/stageA/stageA", "B": "B_lora/stageB", "C": "C_lora/stageC"}
# What the original has no flag for, or reads from the environment.
HERE = ["--text_file", "corpus.txt", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's directory: dense/, the pruned parts where the guide has them, corpus.txt."""
    dense = save_dense(tmp_path / "dense", vocab_size=259)
    save_tokenizer(dense)
    cut(dense, LAYOUT, tmp_path / PRUNED)
    (tmp_path / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def original(stage, base_dir, bundles_dir, *more, use_kd=True, here=HERE):
    """The line of one stage, in the order that the original's own examples have."""
    taught = ["--use_kd", "--teacher_model", "./dense", "--teacher_device", "cpu", "--kd_alpha", "0.1", "--kd_T", "2.0"]
    return train([
        "--base_dir", base_dir, "--bundles_dir", bundles_dir, "--stage", str(stage), "--out_adapters", ADAPTERS,
        "--max_samples", "8", "--seq_len", "32", "--lr", "3e-3", "--epochs", "1", "--bs", "2", "--grad_acc", "2",
        "--warmup_ratio", "0.1", "--logging_steps", "20", "--eval_steps", "0", "--save_steps", "0",
        *(taught if use_kd else []), *more, *here,
    ])  # fmt: skip


def merged(part, base):
    """The guide's merge command."""
    assert merge([
        "--base_model", base, "--adapter_path", f"{ADAPTERS}/{NESTED[part]}",
        "--output_dir", f"./{MERGED}/{part}_merged", "--device", "cpu",
    ]) == 0  # fmt: skip


def test_three_stages_are_trained_merged_and_evaluated_by_the_lines_of_the_guide(folder, capsys):
    assert original(1, f"./{PRUNED}/A", f"./{PRUNED}/bundles") == 0
    told = capsys.readouterr().out
    assert "adapter of A (stage 1)" in told and "0.1 T^2 KL(teacher || student) + 0.9 cross-entropy, T 2" in told
    assert "text:    8 of 42 windows of 32 tokens (--max_samples)" in told
    assert "LoRA:    rank 8, alpha 16, dropout 0.05" in told and "updates: 2 of 2 x 2 windows" in told
    merged("A", f"./{PRUNED}/A")
    assert original(2, f"./{MERGED}/A_merged", f"./{PRUNED}/bundles") == 0
    merged("B", f"./{PRUNED}/bundles/B")
    assert original(3, f"./{MERGED}/A_merged", f"./{PRUNED}/bundles/C", "--b_merged_dir", f"./{MERGED}/B_merged") == 0
    merged("C", f"./{PRUNED}/bundles/C")
    for part, nested in NESTED.items():
        weights = load_file(f"{ADAPTERS}/{nested}/adapter_model.safetensors")
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in weights}
        assert layers == set(LAYOUT.layers_of(part))
        assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    parts = [f"./{MERGED}/{part}_merged" for part in "ABC"]
    done = evaluate(folder, "--model_path", *parts, "--text_file", "corpus.txt", "--seqlen", "64")
    assert done.code == 0, done.err
    assert all(f"A_merged[{label}]" in done.out for label in ("A", "AB", "ABC"))


def test_three_stages_are_trained_on_answers_as_the_original_is(folder, capsys):
    save_questions(folder / "rows")
    here = ["--qa_dataset", "rows/train-v2.0.json", "--max_eval_samples", "4", "--device", "cpu", "--dtype", "fp32"]
    here += ["--seq_len", "96", "--save_total_limit", "2"]
    assert original(1, f"./{PRUNED}/A", f"./{PRUNED}/bundles", here=here[:2] + here[4:]) == 0
    assert "examples are learnt" in capsys.readouterr().out
    merged("A", f"./{PRUNED}/A")
    assert original(2, f"./{MERGED}/A_merged", f"./{PRUNED}/bundles", here=[*here, "--eval_steps", "1"]) == 0
    merged("B", f"./{PRUNED}/bundles/B")
    looks = pd.read_csv(f"{ADAPTERS}/{NESTED['B']}/held_out.csv")
    assert looks.kl.notna().all() and looks.step.iloc[0] == 0
    c = (f"./{MERGED}/A_merged", f"./{PRUNED}/bundles/C", "--b_merged_dir", f"./{MERGED}/B_merged")
    assert original(3, *c, here=here[:2] + here[4:]) == 0
    merged("C", f"./{PRUNED}/bundles/C")
    parts = [f"./{MERGED}/{part}_merged" for part in "ABC"]
    assert evaluate(folder, "--model_path", *parts, "--text_file", "corpus.txt", "--seqlen", "64").code == 0


@pytest.mark.parametrize(
    ("part", "use_kd", "more"),
    [
        ("A", True, ["--teacher", "./dense", "--kd_alpha", "0.1", "--temperature", "2"]),
        ("A", False, ["--kd_alpha", "0"]),
        ("A", False, ["--teacher", "./dense", "--kd_alpha", "0"]),
        (
            "B",
            True,
            ["--teacher", "./dense", "--kd_alpha", "0.1", "--temperature", "2", "--bundle", f"{PRUNED}/bundles/B"],
        ),
    ],
)
def test_the_same_settings_in_our_flags_give_the_same_bytes(folder, part, use_kd, more):
    assert original("AB".index(part) + 1, f"./{PRUNED}/A", f"./{PRUNED}/bundles", use_kd=use_kd) == 0
    assert train([
        "--stage", part, "--student", f"./{PRUNED}/A", "--output_dir", "ours", "--nsamples", "8", "--seqlen", "32",
        "--learning_rate", "3e-3", "--steps", "2", "--batch_size", "2", "--gradient_accumulation", "2",
        "--warmup_steps", "1", "--rank", "8", "--alpha", "16", "--dropout", "0.05", *more, *HERE,
    ]) == 0  # fmt: skip
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / ADAPTERS / NESTED[part] / name).read_bytes() == (folder / "ours" / name).read_bytes()


def test_without_use_kd_no_teacher_is_loaded_and_no_kl_is_measured(folder, capsys):
    assert original(1, f"./{PRUNED}/A", f"./{PRUNED}/bundles", use_kd=False) == 0
    assert "cross-entropy alone, no teacher" in capsys.readouterr().out
    written = folder / ADAPTERS / NESTED["A"]
    curve = pd.read_csv(written / "training.csv")
    assert curve.kl.isna().all() and curve.loss.tolist() == curve.ce.tolist()
    assert json.loads((written / "training.json").read_text())["teacher"] is None


@pytest.mark.parametrize(
    ("stage", "more", "told"),
    [
        (1, ["--qa_dataset", "squad"], "--text_file and --qa_dataset name two texts"),
        (1, ["--teacher_4bit"], "a teacher of four bits needs a GPU and bitsandbytes: the device is cpu"),
        (1, ["--seqlen", "32"], "--seq_len and --seqlen say one thing twice"),
        (2, ["--b_merged_dir", f"{PRUNED}/bundles/B"], "only C's adapter is trained with the merged B"),
        (3, ["--b_merged_dir", f"{PRUNED}/bundles/B"], "this bundle is not a merged one"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(folder, capsys, stage, more, told):
    assert original(stage, f"./{PRUNED}/A", f"./{PRUNED}/bundles", *more) == 1
    _, *errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and told in errors[0]
    assert not (folder / ADAPTERS).exists()


def test_a_teacher_of_another_vocabulary_is_refused(folder, capsys):
    save_dense(folder / "other", vocab_size=261)
    save_tokenizer(folder / "other")
    assert train([
        "--stage", "A", "--student", f"{PRUNED}/A", "--teacher", "other", "--output_dir", "out", "--seqlen", "32", *HERE
    ]) == 1  # fmt: skip
    assert "the teacher's vocabulary has 261 tokens, the student's 259" in capsys.readouterr().err
