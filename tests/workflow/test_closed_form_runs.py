"""Adapters in closed form by snakemake for real: merged, measured, started from, and made again when they must be."""

import copy
import json

import pandas as pd
import pytest
import torch
from torch.nn import functional
from workflow_project import copied

from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.text.windows import Windows

OPTIMISER = {"steps": 4, "batch_size": 2, "gradient_accumulation": 1, "warmup_steps": 0, "learning_rate": 0.01}


@pytest.fixture
def computed(project):
    experiment = project.config["experiments"]["tiny"]
    experiment["adapters"] = {"A": "closed-form", "B": "train"}
    experiment["layers"]["C"] = []
    experiment["perplexity"] |= {"variants": ["pruned", "merged"], "stages": ["A", "AB"], "compare_with_dense": False}
    experiment["closed_form"] = {"seqlen": 32, "windows": 6, "held_out": 2, "dtype": "fp32"}
    experiment["distill"] = {
        "dataset": "corpus", "seqlen": 32, "windows": 6, "dtype": "fp32", "start": "closed-form", "lora": {"rank": 2},
        "parts": {"B": OPTIMISER},
    }  # fmt: skip
    return project


def test_closed_forms_are_merged_started_from_and_made_again(computed):
    jobs = computed.jobs()
    assert (jobs["closed_form"], jobs["train_adapter"], jobs["merge_A"]) == (2, 1, 1)
    made = {file.name.split("-")[0] for file in (computed.folder / "results/shared/activations").iterdir()}
    assert {"dense000", "dense002", "dense004"} <= made, "what enters layers 2, 4 and 5 of the dense model"
    logs = {path.name[0]: path.read_text() for path in (computed.folder / "logs/closed_form").glob("*.log")}
    assert "layers 0" not in logs["A"], "what lies before the corrected layer is the dense model's"
    assert "layers 0-3" in logs["B"], "B's way leads through the merged A"
    told = json.loads(computed.path("adapters/A_lora/closed_form.json").read_text())
    assert [place["layer"] for place in told["corrections"]] == [2]
    started = json.loads(computed.path("adapters/B_lora/training.json").read_text())["start"]
    assert "B-closed-form-" in started["dir"]
    the_merged_a_is_what_transformers_measures(computed)

    # Another seed trains B's adapter again, and what it starts from stays.
    computed.config["experiments"]["tiny"]["distill"]["seed"] = 1
    planned = computed.planned()
    assert planned["train_adapter"] == 1 and not {"closed_form", "merge_A"} & planned.keys()

    # Another rank goes on from what the dense model came to.
    computed.config["experiments"]["tiny"]["closed_form"]["rank"] = 3
    planned = computed.planned()
    assert planned["closed_form"] == 2 and "windows" not in planned
    assert planned["segment"] == 2, "those of the merged stages"

    # Nothing asks for those states before an adapter is made again.
    del computed.config["experiments"]["tiny"]["closed_form"]["rank"]
    computed.config["experiments"]["tiny"]["distill"]["seed"] = 0
    computed.snakemake("drop_activations")
    assert computed.planned() == {}


def test_the_dense_model_s_way_shared_by_jobs_gives_the_same_adapters(computed, tmp_path):
    shared = copied(computed, tmp_path / "shared")
    shared.config = copy.deepcopy(computed.config)
    shared.config["experiments"]["tiny"]["distill"]["shards"] = 2
    target = "results/tiny/adapters/A_lora/adapter_model.safetensors"
    alone, jobs = computed.jobs(target), shared.jobs(target)
    assert "segment_shard" not in alone and jobs["segment_shard"] == 2 * alone["segment"]
    places = [each.folder / "results/shared/activations" for each in (computed, shared)]
    ways = [{file.name: file.read_bytes() for file in place.glob("dense*.safetensors")} for place in places]
    assert len(ways[0]) == alone["segment"] and ways[0] == ways[1]
    assert (computed.folder / target).read_bytes() == (shared.folder / target).read_bytes()
    assert computed.planned(target) == {}
    computed.config = shared.config
    assert computed.planned(target) == {}


def the_merged_a_is_what_transformers_measures(project) -> None:
    table = pd.read_csv(project.folder / "results/summary.csv").set_index(["variant", "stage"])
    model = load_model(project.path("merged/A_merged"), dtype=torch.float32)
    measured = next(
        w
        for w in map(Windows.load, (project.folder / "results/shared/windows").glob("*.safetensors"))
        if w.identity.ids_sha256 == table.ids_sha256.iloc[0]
    )
    ids = measured.ids.long()
    with torch.no_grad():
        nll = functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    found = table.mean_nll["merged", "A"]
    assert found == pytest.approx(nll.item(), rel=1e-5) and found != table.mean_nll["pruned", "A"]
