"""Dtypes by name agree with torch's own, and headers are read without torch."""

import subprocess
import sys

from mistral_prune_lora.storage.dtype_names import ITEMSIZES
from mistral_prune_lora.storage.dtypes import DTYPES


def test_names_and_sizes_are_those_of_torch():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEMSIZES
    assert list(DTYPES) == list(ITEMSIZES)


def test_what_planning_asks_imports_no_torch():
    rooms = ("checkpoints.dense", "checkpoints.adapter_scope", "merging.matching")
    code = "; ".join(f"import mistral_prune_lora.{room}" for room in rooms)
    subprocess.run([sys.executable, "-c", f"import sys; {code}; assert 'torch' not in sys.modules"], check=True)
