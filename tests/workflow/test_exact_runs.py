"""`restore: exact` by snakemake for real: FULL is computed, and is the dense model; AB runs A's original weights."""

import json

import pandas as pd
import pytest
import torch
from cut_model import random_windows
from safetensors.torch import load_file

from mistral_prune_lora.models.load import load_model

OPTIMISER = {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "warmup_steps": 0, "learning_rate": 0.01}


@pytest.fixture
def exact(project):
    experiment = project.config["experiments"]["tiny"]
    experiment |= {"restore": "exact", "adapters": {"A": "closed-form", "B": "train", "C": None}}
    experiment["perplexity"] |= {"variants": ["dense", "merged"], "stages": ["A", "AB", "FULL"]}
    experiment["perplexity"] |= {"compare_with_dense": True}
    experiment["closed_form"] = {"seqlen": 32, "windows": 6, "held_out": 2, "dtype": "fp32"}
    experiment["distill"] = {
        "dataset": "corpus", "seqlen": 32, "windows": 6, "dtype": "fp32", "lora": {"rank": 2},
        "parts": {"B": OPTIMISER},
    }  # fmt: skip
    return project


def test_full_is_the_dense_model(exact):
    jobs = exact.jobs()
    assert (jobs["merge_A"], jobs["merge_B_3to4_undo"], jobs["merge_C_5to6_undo"]) == (1, 1, 1)
    # A 0-1 is shared by all; from layer 2 on, which the closed form changes, A goes its own way.
    assert jobs["segment"] == 4
    table = pd.read_csv(exact.folder / "results/summary.csv").set_index(["variant", "stage"])
    dense, full = table.loc["dense", "FULL"], table.loc["merged", "FULL"]
    assert full.mean_nll == dense.mean_nll and full.weights_sha256 == dense.weights_sha256
    assert full.kl_dense == 0 and full.top1_agreement == 1
    assert table.kl_dense["merged", "A"] > 0 and table.kl_dense["merged", "AB"] > 0

    student = json.loads(exact.path("adapters/B_lora/training.json").read_text())["student"]["dir"]
    assert "/pruning/" in student
    undone = load_file(exact.path("merged/B_merged/undo.safetensors"))
    assert list(undone) == ["model.layers.2.mlp.down_proj.weight"]

    merged = [exact.path(f"merged/{part}_merged") for part in "ABC"]
    with torch.inference_mode():
        ids = random_windows(2, 12).ids.long()
        ours = load_model(merged[0], dtype=torch.float32, bundles=tuple(merged[1:]))(ids).logits
        assert torch.equal(ours, load_model(exact.folder / "dense", dtype=torch.float32)(ids).logits)
    assert exact.planned() == {}
