"""Trainings by snakemake for real: held-out windows, shared states, and what healing is compared with."""

import json

import pandas as pd
import pytest
import torch
from peft import PeftModel
from torch.nn import functional

from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.text.windows import Windows

OPTIMISER = {"steps": 6, "batch_size": 2, "gradient_accumulation": 1, "warmup_steps": 0, "learning_rate": 0.01}


@pytest.fixture
def trained(project):
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"] = {"A": "train", "B": "train", "C": "train"}
    experiment["perplexity"]["variants"] = ["merged"]
    experiment["layers"]["C"] = []
    experiment["perplexity"] |= {"stages": ["A", "AB"], "compare_with_dense": False}
    experiment["baselines"] = ["no-kd", "joint-AB"]
    experiment["distill"] = {
        "dataset": "corpus", "seqlen": 32, "windows": 6, "dtype": "fp32", "share_teacher_states": True,
        "share_prefix_states": True, "lora": {"rank": 2}, "parts": {part: OPTIMISER for part in "ABC"},
        "loss": {"kd_alpha": 0.5, "hidden": {"student_layer": 7, "teacher_layer": 7, "weight": 0.1}},
        "held_out": {"windows": 3, "eval_steps": 2, "keep": "last"},
    }  # fmt: skip
    return project


def test_what_is_shared_is_made_once_and_every_variant_has_its_rows(trained):
    jobs = trained.jobs()
    # A and B with and without a teacher, and the stage as a whole; states of training and held-out windows, and of the
    # watched layer; B's prefix, of training and held-out windows, with and without a teacher.
    assert (jobs["train_adapter"], jobs["train_joint_AB"]) == (4, 1)
    assert (jobs["teacher_states"], jobs["prefix_states"], jobs["merge_A"], jobs["merge_B_3to4"]) == (3, 4, 3, 3)
    table = pd.read_csv(trained.folder / "results/summary.csv")
    rows = table.groupby("variant", sort=False).stage.apply(list).to_dict()
    assert rows == {"merged": ["A", "AB"], "no-kd": ["A", "AB"], "joint-AB": ["AB"]}
    assert table.ppl.nunique() == 5
    assert b"<svg" in trained.path("training.svg").read_bytes()[:400]
    joint_is_the_adapter_of_the_stage(trained, table)
    the_held_out_windows_follow(trained)

    # How often the state is saved is nobody's business; another seed leaves prefix and teacher as they are.
    distill = trained.config["experiments"]["tiny"]["distill"]
    distill["save_steps"] = 1
    assert trained.planned() == {}
    distill["seed"] = 1
    planned = trained.planned()
    assert planned["train_adapter"] == 4 and not {"teacher_states", "windows"} & planned.keys()


def joint_is_the_adapter_of_the_stage(project, table) -> None:
    """What was measured of the parts trained together is what PEFT makes of their adapters."""
    root = next(iter((project.folder / "results/shared/adapters").glob("AB-*")))
    pruned = project.path("pruning")
    model = load_model(pruned / "A", dtype=torch.float32, bundles=(pruned / "bundles/B",))
    for part in "AB":
        model = PeftModel.from_pretrained(model, root / f"{part}_lora").merge_and_unload()
    measured = next(
        w
        for w in map(Windows.load, (project.folder / "results/shared/windows").glob("*.safetensors"))
        if w.identity.ids_sha256 == table.ids_sha256[0]
    )
    ids = measured.ids.long()
    with torch.no_grad():
        nll = functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    assert table[table.variant == "joint-AB"].mean_nll.item() == pytest.approx(nll.item(), rel=1e-5)


def the_held_out_windows_follow(project) -> None:
    record = json.loads(project.path("adapters/B_lora/training.json").read_text())
    trained, held = record["windows"], record["held_out"]
    assert (trained["windows"], held["windows"]) == (6, 3)
    looks = pd.read_csv(project.path("adapters/B_lora/training.json").resolve().with_name("held_out.csv"))
    assert looks.step.tolist() == [0, 2, 4, 6] and record["kept_step"] == 6
