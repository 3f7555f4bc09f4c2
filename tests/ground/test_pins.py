"""requirements.txt is the one place for versions; what repeats them must agree, and hold what its scripts import."""

import re
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml
from script_imports import SCRIPTS, imports_of

from mistral_prune_lora.workflow.configuration import check_config

ROOT = Path(__file__).parents[2]
ENVS = sorted(p.name for p in (ROOT / "envs").glob("*.yaml"))
ONLY = ROOT / "tests/support/only_packages.py"


def pins(lines):
    stripped = (line.split("#")[0].strip() for line in lines)
    return dict(line.split("==") for line in stripped if line)


def listed(env):
    return yaml.safe_load((ROOT / "envs" / env).read_text())["dependencies"][-1]["pip"]


def scripts_by_environment():
    """The scripts of the rules of each environment, as the rules' files have them."""
    found = {env: set() for env in ENVS}
    for rules in [*ROOT.glob("rules/*.smk"), ROOT / "Snakefile"]:
        for rule in re.split(r"^ *(?:rule|checkpoint)\b", rules.read_text(), flags=re.MULTILINE):
            names = dict(re.findall(r'^ *(conda|script):\s+"\.\./\w+/(.+)"$', rule, re.MULTILINE))
            if "script" in names:
                found[names["conda"]].add(names["script"])
    return found


def within(env, code, tmp_path):
    """A process of that code that finds the packages of an environment, what they require, and the library."""
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, ONLY, ",".join(pins(listed(env))), tmp_path / "script.py"]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize("env", ENVS)
def test_conda_environments_agree_with_requirements(env):
    wanted = pins((ROOT / "requirements.txt").read_text().splitlines())
    assert listed(env)
    assert pins(listed(env)).items() <= wanted.items()


def test_every_environment_installs_the_library():
    for env in (ROOT / "envs").glob("*.yaml"):
        assert "--editable ." in env.with_suffix(".post-deploy.sh").read_text()


def test_every_script_belongs_to_a_rule_with_an_environment():
    assert set.union(*scripts_by_environment().values()) == {script.name for script in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize("env", ENVS)
def test_every_script_finds_what_it_imports_in_its_environment(env, tmp_path):
    codes = [imports_of(SCRIPTS / name) for name in sorted(scripts_by_environment()[env])]
    run = within(env, "\n".join(codes), tmp_path)
    assert run.returncode == 0, run.stderr


def test_the_small_environment_has_no_torch(tmp_path):
    run = within("report.yaml", "import torch", tmp_path)
    assert "ModuleNotFoundError: No module named 'torch'" in run.stderr


def test_the_look_at_a_configuration_finds_what_it_imports_during_its_work(project):
    rows = [{"text": f"Sentence {i}."} for i in range(20)]
    pd.DataFrame(rows).to_parquet(project.folder / "table.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(project.folder / "saved")
    project.config["datasets"] |= {"table": {"dataset": "table.parquet"}, "saved": {"dataset": "saved"}}
    project.config["experiments"]["tiny"]["perplexity"]["datasets"] = ["corpus", "table", "saved"]
    config = check_config(project.config, ROOT / "rules/config.schema.yaml")
    preview = "from mistral_prune_lora.workflow.preview import preview"
    run = within("report.yaml", f"{preview}\nprint(preview({config!r}))", project.folder)
    assert "faults: none" in run.stdout, run.stdout + run.stderr
