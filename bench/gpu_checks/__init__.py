"""Checks of the library on one device: each is a function of a `Setting` that gives `Finding`s.

`bench/gpu.py` prints them as a table, `tests/gpu` makes a test of each. They run on a CPU too, at a tiny size. They
need torch, transformers, peft, safetensors, pandas and pyarrow, and what comes with these; the library is that of the
tree in which this package lies, installed or not.
"""

import os
import sys
from pathlib import Path

from gpu_checks.stand_in import stand_in_for_xxhash

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lib"))
# cuBLAS promises the same bits from run to run only with a workspace of fixed size, and reads this when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
stand_in_for_xxhash()
