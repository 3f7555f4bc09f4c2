"""Mistakes of a user, as snakemake reports them; and failures, which must not be forgotten."""

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from workflow_project import ROOT

from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.plan import Plan


def test_every_mistake_in_the_configuration_is_named_before_anything_runs(project):
    experiment = project.config["experiments"]["tiny"]
    experiment["perplexity"]["seqlenn"] = 3
    experiment["adapters"]["D"] = "x"
    printed = project.snakemake(succeeds=False)
    assert "experiments.tiny.perplexity.seqlenn: unknown key" in printed
    assert "experiments.tiny.adapters.D: unknown key; known here: A, B, C" in printed
    assert printed.count("error: ") == 1 and "Traceback" not in printed and "common.smk" not in printed
    assert not (project.folder / "results").exists()


@pytest.mark.parametrize(
    ("file", "put", "told"),
    [
        ("tokenizer.json", os.mkfifo, "is not a regular file"),
        ("config.json", os.mkdir, "is not a regular file"),
        ("config.json", lambda path: path.write_text("{"), "cannot be read as JSON"),
        ("config.json", lambda path: path.write_bytes(b"\xe4"), "cannot be read as JSON"),
        ("config.json", lambda path: path.write_text('{"model_type": "gpt2"}'), "the model_type 'gpt2' is not one"),
        ("config.json", lambda path: None, "dense holds no config.json"),
    ],
)
def test_a_model_that_cannot_be_read_ends_with_the_one_message(project, file, put, told):
    (project.folder / "dense" / file).unlink()
    put(project.folder / "dense" / file)
    printed = project.snakemake("--dry-run", succeeds=False)
    assert f"models.dense.path: {told}" in printed
    assert printed.count("error: ") == 1 and "Traceback" not in printed and "common.smk" not in printed


def test_a_failed_merge_leaves_nothing_behind_and_is_not_forgotten(finished):
    weights = finished.folder / "adapters/C/adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    printed = finished.snakemake(succeeds=False)
    assert "holds NaN or infinity" in printed and "adapter_model.safetensors" in printed
    assert len(list(finished.folder.glob("results/shared/merged/C-*/C_merged/merge.json"))) == 1  # the former one
    # Still failed, though everything that is left is older than the summary.
    finished.snakemake(succeeds=False)
    finished.replace_adapter("C", by="other_C")
    assert finished.jobs()["merge_C_5to6"] == 1
    assert len(list(finished.folder.glob("results/shared/merged/C-*/C_merged/merge.json"))) == 2


def test_layers_that_the_model_does_not_have(project):
    project.config["experiments"]["tiny"]["layers"]["C"] = [5, 8]
    assert "layers [8] do not exist in a model of 8 layers" in project.snakemake(succeeds=False)


def test_a_wrong_number_of_layers_is_found_before_anything_runs(project):
    project.config["models"]["dense"]["num_layers"] = 9
    printed = project.snakemake("results/tiny/pruning/A/config.json", succeeds=False)
    assert "models.dense.num_layers" in printed and "8" in printed and not (project.folder / "results").exists()


def test_windows_that_could_not_be_made_are_asked_for_again(finished):
    finished.config["experiments"]["tiny"]["perplexity"]["seqlen"] = 100_000
    assert "less than one window" in finished.snakemake(succeeds=False)
    planned = finished.planned()
    assert planned["windows"] == 1 and planned["perplexity"] == 6


def test_a_segment_that_failed_is_not_passed_over(finished, monkeypatch):
    """The new C was merged, its segment failed: the summary is older than what it should have been made from."""
    finished.replace_adapter("C", by="other_C")
    monkeypatch.chdir(finished.folder)
    config = check_config(copy.deepcopy(finished.config), ROOT / "rules/config.schema.yaml")
    experiment = Plan.of(config, Content(finished.folder / "digests.json")).experiments["tiny"]
    file = Path(experiment.measuring.segment("merged", "corpus", "C005-006_FULL").activations)
    in_the_way = file.with_name(f".{file.name}.partial")
    in_the_way.mkdir()
    finished.snakemake(succeeds=False)
    in_the_way.rmdir()
    assert finished.planned() == {"segment": 1, "perplexity": 1, "summary": 1, "plot_perplexity": 1}


def test_a_ranking_without_a_text_is_refused_by_name(project):
    assert "experiments.tiny.importance.dataset" in project.snakemake("results/tiny/importance.csv", succeeds=False)
