"""Datasets of the Hub, by its own libraries from a server that speaks its protocol."""

import json
import os
import subprocess
import sys

import pandas as pd
from hub_server import COMMIT, REPO, serving
from question_rows import ROWS

CARD = """---
configs:
- config_name: plain_text
  data_files:
  - { split: train, path: plain_text/train-* }
  - { split: validation, path: plain_text/validation-* }
---
"""
# In a process of its own: where the Hub is, its libraries learn while they are imported.
CODE = """
import json, sys
from mistral_prune_lora.errors import DataError
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.text.hub_rows import open_rows
for asked in json.loads(sys.argv[1]):
    try:
        found = open_rows(DatasetSpec(shape="prompt", preset="squad", **asked))
        told = [found.name, found.source, found.count, [row["answers"]["text"][:1] for row in found.rows]]
    except DataError as error:
        told = str(error)
    print("told:", json.dumps(told))
"""
ANSWERS = [row["answers"]["text"][:1] for row in ROWS]


def asking(endpoint, cache, *asked, **environment):
    known = [{"dataset": REPO, "revision": COMMIT, **each} for each in asked]
    where = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), **environment}
    run = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(known)],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    lines = [line.removeprefix("told: ") for line in run.stdout.splitlines() if line.startswith("told: ")]
    return [json.loads(line) for line in lines]


def test_rows_are_fetched_streamed_and_found_again_without_network(tmp_path):
    repo, cache = tmp_path / "repo", tmp_path / "cache"
    (repo / "plain_text").mkdir(parents=True)
    (repo / "README.md").write_text(CARD)
    for split, rows in (("train", ROWS), ("validation", ROWS[:2])):
        pd.DataFrame(rows).to_parquet(repo / f"plain_text/{split}-00000-of-00001.parquet")
    source = f"{REPO}@{COMMIT}"
    with serving(repo) as endpoint:
        sliced, named, stream, split, commit, config, nobody = asking(
            endpoint,
            cache,
            {"split": "train[:3]"},
            {"split": "validation", "config": "plain_text"},
            {"split": "train", "streaming": True},
            {"split": "dev"},
            {"split": "train", "revision": "b" * 40},
            {"split": "train", "config": "other"},
            {"split": "train", "dataset": "me/none"},
        )
    assert sliced == ["squad", f"{source}: train[:3]", 3, ANSWERS[:3]]
    assert named == ["squad", f"{source} (plain_text): validation", 2, ANSWERS[:2]]
    assert stream == ["squad", f"{source}: train", None, ANSWERS]
    assert 'Unknown split "dev"' in split and "Ask for what it has" in split
    assert f"has no commit {'b' * 40}" in commit
    assert "'other' not found. Available: ['plain_text']" in config
    assert "there is no such dataset, or it is private" in nobody and "me/none" in nobody
    found, other = asking(
        endpoint, cache, {"split": "train"}, {"split": "train", "revision": "b" * 40}, HF_HUB_OFFLINE="1"
    )
    assert found == ["squad", f"{source}: train", 5, ANSWERS]
    assert f"the local cache holds commit {COMMIT}, not {'b' * 40}" in other
