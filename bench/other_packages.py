"""An environment of its own for what a benchmark compares with: `python bench/other_packages.py trl` makes it ahead."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".venv-bench"


def environment(name: str) -> Path:
    """The Python of an environment, which is made anew whenever its requirements have changed.

    Args:
        name: of its file in bench/requirements.

    Raises:
        SystemExit: pip could not install them; says what pip said.
    """
    wanted, folder = HERE / f"requirements/{name}.txt", ENVIRONMENTS / name
    stamp, python = folder / "installed.txt", folder / "bin/python"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        print(f"setting up {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--requirement", wanted]
        done = subprocess.run([str(word) for word in pip], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{wanted} could not be installed:\n{done.stderr}")
        stamp.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return python


if __name__ == "__main__":
    print(environment(sys.argv[1]))
