"""Where the checks lie that the tests of this folder are made of."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
