"""What the profiles ask of a machine or a cluster, rule by rule, from dry runs."""

import re

import pytest
import yaml
from workflow_project import ROOT


def resources_of_jobs(printed: str) -> dict[str, set[str]]:
    """The lines `resources: ...` of a dry run by rule."""
    found: dict[str, set[str]] = {}
    for block in re.split(r"\n(?=(?:local)?rule )", printed):
        name = re.match(r"(?:local)?rule (\w+):", block)
        line = re.search(r"\n\s+resources: (.*)", block)
        if name and line:
            found.setdefault(name[1], set()).add(line[1])
    return found


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_every_heavy_rule_asks_for_what_the_profile_says(project, profile):
    folder = ROOT / "profiles" / profile
    printed = project.snakemake("--dry-run", "--workflow-profile", str(folder))
    asked = resources_of_jobs(printed)
    wanted = yaml.safe_load((folder / "config.yaml").read_text())
    for rule in ("merge_A", "segment", "perplexity", "dense_perplexity"):
        (line,) = asked[rule]
        values = {**wanted["default-resources"], **wanted["set-resources"].get(rule, {})}
        for key, value in values.items():
            number = str(value).removeprefix("attempt * ")
            assert f"{key}={number}" in line, (rule, line)


def test_profiles_name_only_rules_that_exist(project):
    known = set(project.snakemake("--list-rules").split())
    for profile in ("default", "slurm"):
        settings = yaml.safe_load((ROOT / "profiles" / profile / "config.yaml").read_text())
        named = set(settings.get("set-resources", {})) | set(settings.get("set-threads", {}))
        assert named <= known
