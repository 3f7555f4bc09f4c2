"""A Slurm for the tests of this folder: one that answers, or one that is started for them where MPL_CLUSTER is set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_node import answers, lacking, slurm_node


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """The folder with the logs of its processes, if it was started here."""
    folder = tmp_path_factory.mktemp("slurm")
    if answers():
        yield folder
        return
    if not os.environ.get("MPL_CLUSTER"):
        pytest.skip("no Slurm answers; `make test-cluster` starts one, as root and with Debian's slurm-wlm and munge")
    if why := lacking():
        pytest.fail(f"no Slurm can be started: {why}")
    with slurm_node(folder / "node"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder / "node/bin"), prepend=os.pathsep)
        yield folder
