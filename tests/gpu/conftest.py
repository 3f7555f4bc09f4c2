"""Where the checks lie that the tests of this folder are made of, and what they found, as one table at the end."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
FOUND = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def found(pytestconfig) -> list:
    """The rows of the table: every finding of the checks that have run."""
    return pytestconfig.stash.setdefault(FOUND, [])


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the table and the card, as bench/gpu.py does."""
    if rows := config.stash.get(FOUND, []):
        import gpu
        import torch

        terminalreporter.write_line(f"\n{gpu.table(rows)}\n\n{gpu.machine(torch.device('cuda:0'))}")
