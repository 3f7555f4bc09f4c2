"""Windows shared by several jobs: the results of a single job each, and another number of jobs runs nothing again."""

import yaml
from workflow_project import ROOT

from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.plan import Plan


def test_windows_may_be_shared_by_jobs_and_another_number_runs_nothing(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    config = check_config(yaml.safe_load(yaml.safe_dump(finished.config)), ROOT / "rules/config.schema.yaml")
    score = (
        Plan.of(config, Content(finished.folder / "digests.json"))
        .experiments["tiny"]
        .measuring.score("merged", "corpus", "FULL")
    )
    files = [finished.folder / name for name in (score.result, score.window_scores, score.source.activations)]
    single = [file.read_bytes() for file in files]
    wanted = finished.config["experiments"]["tiny"]["perplexity"]
    wanted["shards"] = 3
    assert finished.planned() == {}

    for file in files:
        file.unlink()
    finished.snakemake("--cleanup-metadata", *(str(file.relative_to(finished.folder)) for file in files))
    ran = finished.jobs()
    # Six windows in batches of four make two batches, and no shard goes without one.
    assert {rule: count for rule, count in ran.items() if "segment" in rule or rule.startswith("perplexity")} == {
        "segment": 1, "segment_shard": 2, "perplexity": 1, "perplexity_shard": 2,
    }  # fmt: skip
    assert [file.read_bytes() for file in files] == single
    assert not [file for file in (finished.folder / "results/shared/shards").rglob("*") if file.is_file()]
    for number in (3, 2, 1):
        wanted["shards"] = number
        assert finished.planned() == {}
    # What is made again is made of as many shards as before.
    files[1].unlink()
    again = finished.planned()
    assert again["perplexity"] == 1 and again["perplexity_shard"] == 2 and "segment" not in again
