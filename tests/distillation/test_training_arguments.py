"""The original trainer's flags made into ours: what each means, what contradicts, what is refused by its name."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_prune_lora.checkpoints.descriptions import make_manifest
from mistral_prune_lora.distillation.arguments import (
    DEFAULTS,
    INSTEAD,
    ORIGINAL_DEFAULTS,
    SAME,
    training_request,
)
from mistral_prune_lora.distillation.settings import LossSettings, TrainingSettings
from mistral_prune_lora.errors import CheckpointError, LayoutError, PipelineError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.mistral_optimized_kd_lora import parser
from mistral_prune_lora.text.dataset_spec import question_dataset

TAUGHT = ["--use_kd", "--teacher_model", "dense", "--kd_alpha", "0.3", "--kd_T", "4"]
TEXT = ["--text_file", "corpus.txt"]
THEIRS = [
    "--base_dir", "A", "--out_adapters", "adapters", "--max_samples", "40", "--seq_len", "64", "--lr", "3e-4",
    "--epochs", "2", "--bs", "3", "--grad_acc", "4", "--warmup_ratio", "0.15", *TAUGHT, *TEXT,
]  # fmt: skip
OURS = ["--stage", "A", "--student", "A", "--output_dir", "out", "--teacher", "dense"]


def request(*flags):
    return training_request(vars(parser().parse_args(flags)))


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """A's manifest, the pruned bundles, and B merged; no weights: names and records are all that is looked at."""
    monkeypatch.chdir(tmp_path)
    layout = Layout(8, (3, 4), (5, 6))
    manifest = make_manifest(layout, base_model="dense", model_type="mistral", selection={}, artifacts={})
    (tmp_path / "A").mkdir()
    (tmp_path / "A/manifest.json").write_text(json.dumps(manifest))
    for name, part, merged in (("bundles/B", "B", {}), ("bundles/C", "C", {}), ("B_merged", "B", {"merged": True})):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for layer in layout.layers_of(part):
            (folder / f"layer_{layer:03d}.safetensors").touch()
        (folder / "bundle_meta.json").write_text(json.dumps({"indices": list(layout.layers_of(part)), **merged}))
    return tmp_path


def test_every_flag_means_what_ours_means(pruned):
    asked = request("--stage", "1", "--bundles_dir", "bundles", *THEIRS)
    assert (asked.part, asked.student, asked.teacher, asked.bundles) == ("A", "A", "dense", ())
    assert asked.output_dir == "adapters/A_lora/stageA/stageA"
    assert (asked.settings["seqlen"], asked.settings["nsamples"]) == (64, 40)
    assert asked.training(25).loss == LossSettings(0.3, 4.0)
    # 2 x 25 windows in updates of 12 are 4.17 updates, and 0.15 x 5 of them 0.75.
    assert asked.optimiser(25) == {
        "steps": 5, "batch_size": 3, "gradient_accumulation": 4, "learning_rate": 3e-4, "warmup_steps": 1,
        "weight_decay": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip
    assert asked.optimiser(24)["steps"] == 4 and asked.optimiser(1)["steps"] == 1


@pytest.mark.parametrize(
    ("stage", "more", "output", "bundles"),
    [
        ("2", ["--bundles_dir", "bundles"], "adapters/B_lora/stageB", ("bundles/B",)),
        ("2", ["--bundles_dir", "bundles/B"], "adapters/B_lora/stageB", ("bundles/B",)),
        ("3", ["--bundles_dir", "bundles", "--b_merged_dir", "B_merged"], "adapters/C_lora/stageC", None),
        ("3", ["--bundles_dir", "bundles/C", "--b_merged_dir", "B_merged"], "adapters/C_lora/stageC", None),
        ("3", ["--bundle", "bundles/B", "--bundle", "bundles/C"], "adapters/C_lora/stageC", ("bundles/B", "bundles/C")),
    ],
)
def test_the_bundles_of_each_stage_are_found_where_the_original_finds_them(pruned, stage, more, output, bundles):
    asked = request("--stage", stage, *more, *THEIRS)
    assert asked.part == {"2": "B", "3": "C"}[stage] and asked.output_dir == output
    assert asked.bundles == (bundles or ("B_merged", "bundles/C"))


def test_what_is_left_out_takes_the_defaults_of_its_spelling(pruned):
    ours = request(*OURS)
    assert ours.optimiser(7)["steps"] == 1000 and ours.optimiser(7)["warmup_steps"] == 50
    theirs = request(
        "--stage", "1", "--base_dir", "A", "--out_adapters", "o", *TEXT, "--use_kd", "--teacher_model", "d"
    )
    assert theirs.training(320).lora == replace(ours.training(320).lora, rank=8, alpha=16, dropout=0.05)
    assert theirs.training(320).loss == LossSettings(0.1, 2.0)
    assert theirs.optimiser(320) == {
        **ours.optimiser(320), "steps": 10, "gradient_accumulation": 32, "warmup_steps": 1
    }  # fmt: skip
    assert (theirs.settings["seqlen"], theirs.settings["nsamples"]) == (1024, 20000)
    counted = request("--stage", "1", *THEIRS[:4], *THEIRS[-2:], "--steps", "7", "--warmup_steps", "3")
    assert counted.optimiser(320)["steps"] == 7 and counted.optimiser(320)["warmup_steps"] == 3


def test_our_defaults_are_those_of_the_library():
    asked = request(*OURS)
    assert asked.training(5) == TrainingSettings()
    assert ORIGINAL_DEFAULTS.keys() <= DEFAULTS.keys()


def test_without_use_kd_the_original_trains_on_cross_entropy_alone(pruned):
    plain = request("--stage", "1", "--base_dir", "A", "--out_adapters", "o", *TEXT)
    assert plain.teacher is None and plain.training(5).loss.kd_alpha == 0
    assert "cross-entropy alone, no teacher" in plain.told(8, 8)
    assert request("--stage", "A", "--student", "A", "--output_dir", "o", "--kd_alpha", "0").teacher is None


def test_what_is_about_to_be_done_is_told(pruned):
    told = request("--stage", "3", "--bundles_dir", "bundles", "--b_merged_dir", "B_merged", *THEIRS).told(40, 126)
    assert told == (
        "student: A, with B_merged and bundles/C restored; adapter of C (stage 3)\n"
        "loss:    0.3 T^2 KL(teacher || student) + 0.7 cross-entropy, T 4, teacher dense\n"
        "text:    40 of 126 windows of 64 tokens (--max_samples)\n"
        "LoRA:    rank 8, alpha 16, dropout 0.05\n"
        "updates: 7 of 3 x 4 windows, 2.10 times the text; 2 to warm up to learning rate 0.0003"
    )
    logged = request(*OURS, "--logging_steps", "20").told(5, 5)
    assert "5 of 5 windows of 2048 tokens\n" in logged and "training.csv keeps every update" in logged


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--stage", "1", *THEIRS, "--seqlen", "64"], "--seq_len and --seqlen say one thing twice"),
        (["--stage", "1", *THEIRS, "--learning_rate", "1e-4"], "--lr and --learning_rate say"),
        (["--stage", "1", *THEIRS, "--student", "A"], "--base_dir and --student say"),
        (["--stage", "1", *THEIRS, "--teacher", "dense"], "--teacher_model and --teacher say"),
        (["--stage", "1", *THEIRS, "--output_dir", "o"], "--out_adapters and --output_dir say"),
        (["--stage", "1", *THEIRS, "--steps", "9"], "--epochs and --steps say"),
        (["--stage", "1", *THEIRS, "--warmup_steps", "9"], "--warmup_ratio and --warmup_steps say"),
        (["--stage", "2", *THEIRS, "--bundles_dir", "bundles", "--bundle", "b"], "--bundles_dir and --bundle say"),
        (["--stage", "1", *THEIRS, "--dataset", "c4"], "--dataset and --text_file name two texts"),
        (["--stage", "1", *THEIRS, "--qa_dataset", "squad"], "--text_file and --qa_dataset name two texts"),
        ([*OURS, "--dataset", "c4", "--qa_dataset", "squad"], "--dataset and --qa_dataset name two texts"),
        ([*OURS, "--qa_dataset", "squad", "--mirror", "m"], "a mirror is of a --dataset"),
        (["--stage", "1", *THEIRS[2:]], "neither --student nor --base_dir is given"),
        (["--stage", "1", *THEIRS[:2], *THEIRS[4:]], "neither --output_dir nor --out_adapters is given"),
        (["--stage", "1", *THEIRS, "--b_merged_dir", "B_merged"], "only C's adapter is trained with the merged B"),
        (["--stage", "2", *THEIRS], "bundle B restored (in --bundles_dir)"),
        (
            ["--stage", "3", *THEIRS, "--bundles_dir", "bundles"],
            "the merged B and bundle C restored (in --b_merged_dir)",
        ),
        (["--stage", "1", *THEIRS, "--teacher_device", "cuda:1"], "not on cuda:1 (in --teacher_device)"),
        (["--stage", "1", *THEIRS[:-8], *TEXT, "--use_kd"], "there is no teacher to learn from (in --teacher_model)"),
        (["--stage", "1", *THEIRS[:4], *TEXT, *TAUGHT[1:]], "--teacher_model, --kd_T, --kd_alpha without --use_kd"),
        (OURS[:-2], "there is no teacher to learn from (in --teacher)"),
        ([*OURS[:-2], "--kd_alpha", "0", "--teacher_states", "f"], "there is no teacher to learn from"),
    ],
)
def test_contradictions_and_gaps_are_refused(pruned, flags, told):
    with pytest.raises(PipelineError) as refused:
        request(*flags)
    assert told in str(refused.value)


def test_the_original_trains_on_squad_where_nothing_else_is_named(pruned):
    asked = request("--stage", "1", *THEIRS[:-2]).settings
    assert (asked["dataset"], asked["qa_dataset"]) == (None, "squad")
    assert request("--stage", "1", *THEIRS).settings["qa_dataset"] is None
    assert request("--stage", "1", *THEIRS[:-2], "--dataset", "c4").settings["qa_dataset"] is None
    assert request(*OURS).settings["qa_dataset"] is None
    ours = request(*OURS, "--qa_dataset", "squad_v2", "--max_samples", "7").settings
    assert (ours["dataset"], ours["qa_dataset"], ours["nsamples"]) == (None, "squad_v2", 7)
    assert request("--stage", "1", *THEIRS[:4], *THEIRS[6:-2]).settings["nsamples"] == 20000


def test_questions_are_named_by_preset_or_path(pruned):
    (pruned / "mine.json").touch()
    named = [question_dataset(name) for name in ("squad", "squad_v2", "mine.json", "squad_v2=mine.json")]
    assert [(spec.dataset, spec.preset) for spec in named] == [
        ("rajpurkar/squad", "squad"),
        ("rajpurkar/squad_v2", "squad_v2"),
        ("mine.json", "squad"),
        ("mine.json", "squad_v2"),
    ]
    assert all(spec.split == "train" and not list(spec.faults()) for spec in named)
    for wrong in ("squad3", "squad_v2=nowhere"):
        with pytest.raises(PipelineError, match=r"is no file or folder \(in --qa_dataset\)"):
            question_dataset(wrong)


def test_zeros_and_places_that_ask_for_nothing_else_are_taken(pruned):
    same = ["--eval_steps", "0", "--save_steps", "0", "--teacher_device", "cpu", "--device", "cpu"]
    assert request("--stage", "1", *THEIRS, *same).settings["device"] == "cpu"
    assert request("--stage", "1", *THEIRS, "--teacher_device", "auto", "--device", "cuda:1").teacher == "dense"


def test_bundles_of_another_pruning_and_an_unmerged_b_are_refused(pruned):
    with pytest.raises(LayoutError, match="not a merged one"):
        request("--stage", "3", *THEIRS, "--bundles_dir", "bundles", "--b_merged_dir", "bundles/B")
    with pytest.raises(CheckpointError, match="is not a bundle"):
        request("--stage", "3", *THEIRS, "--bundles_dir", "bundles", "--b_merged_dir", "nowhere")
    with pytest.raises(LayoutError, match="holds neither B nor C"):
        request("--stage", "1", *THEIRS, "--bundles_dir", "nowhere")
    (pruned / "bundles/C/layer_007.safetensors").touch()
    (pruned / "bundles/C/bundle_meta.json").write_text('{"indices": [5, 6, 7]}')
    with pytest.raises(LayoutError, match=r"C holds layers \[5, 6, 7\], and A was cut into \[5, 6\]"):
        request("--stage", "1", *THEIRS, "--bundles_dir", "bundles")


def test_every_flag_of_the_original_is_explained_and_documented_lines_are_taken():
    page = (Path(__file__).parents[2] / "docs/from-the-original-scripts.md").read_text()
    for name in (*SAME, *INSTEAD, "qa_dataset", "use_kd", "teacher_device", "logging_steps", "kd_alpha"):
        assert f"`--{name}" in page, name
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in joined(block)]
    trained = [shlex.split(line)[3:] for line in lines if "mistral_optimized_kd_lora" in line]
    assert trained
    for flags in trained:
        assert parser().parse_args(flags).stage in ("1", "2", "3")


def joined(block):
    """Commands of a shell script, each on one line."""
    return block.replace("\\\n", " ").splitlines()


def test_the_help_and_the_mapping_need_no_torch():
    code = "import sys; from mistral_prune_lora.mistral_optimized_kd_lora import parser; parser().format_help()"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], capture_output=True)
    assert done.returncode == 0, done.stderr
