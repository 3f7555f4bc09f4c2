"""requirements.txt is the one place for versions; what repeats them must agree."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def pins(lines):
    stripped = (line.split("#")[0].strip() for line in lines)
    return dict(line.split("==") for line in stripped if line)


@pytest.mark.parametrize("env", sorted(p.name for p in (ROOT / "envs").glob("*.yaml")))
def test_conda_environments_agree_with_requirements(env):
    wanted = pins((ROOT / "requirements.txt").read_text().splitlines())
    listed = yaml.safe_load((ROOT / "envs" / env).read_text())["dependencies"][-1]["pip"]
    assert listed
    assert pins(listed).items() <= wanted.items()


def test_every_environment_installs_the_library():
    for env in (ROOT / "envs").glob("*.yaml"):
        assert "--editable ." in env.with_suffix(".post-deploy.sh").read_text()
