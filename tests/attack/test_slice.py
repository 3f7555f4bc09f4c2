"""A slice of the campaign of tests/attack, whose whole is `make attack`: every kind of file, every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from attack.formats import Kind

CAMPAIGN = Path(__file__).parent
SLICE = ("--files", "44", "--kills", "6", "--disks", "6", "--writers", "6", "--workers", "1")


def test_a_slice_of_the_campaign_is_borne():
    command = [sys.executable, str(CAMPAIGN), *SLICE, "--minutes", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-20_000:]}"
    missing = [kind for kind in Kind if f"| file: {kind.value.told} |" not in done.stdout]
    assert not missing, "no scene has a file of that kind any more"
