"""Several processes that train one adapter, as torchrun starts them: they make the adapter of one."""

import os
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from safetensors.torch import load_file
from training_jobs import train_job

from mistral_prune_lora.distillation.settings import HeldOutSettings, LoraSettings, LossSettings, OptimiserSettings
from mistral_prune_lora.layout.partition import Layout

LAYOUT = Layout(8, (3, 4), (5, 6))
WORKER = """
import os, signal, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_ranks import given
from training_jobs import train_job
from mistral_prune_lora.distillation import loop
stop = int(sys.argv[3])
tell = loop.Loop._tell
def told(self, bar, seconds):
    tell(self, bar, seconds)
    if self.step == stop and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
loop.Loop._tell = told
train_job("B", **given(sys.argv[1], sys.argv[2], accumulation=1))
"""


def given(folder, output, accumulation) -> dict:
    return {
        "student_dir": f"{folder}/A", "teacher_dir": f"{folder}/dense", "bundles": (f"{folder}/bundles/B",),
        "windows": random_windows(6, 16), "output_dir": output, "held_out_windows": random_windows(3, 16, seed=2),
        "dtype": torch.float32, "lora": LoraSettings(rank=2), "loss": LossSettings(0.5, 2.0),
        "optimiser": OptimiserSettings(8, 2, accumulation, 1e-2, 2), "held_out": HeldOutSettings(4, "best"),
    }  # fmt: skip


def torchrun(folder, output, stop=0) -> subprocess.CompletedProcess:
    paths = [p for p in sys.path if p.endswith(("tests/support", "tests"))] + [os.path.dirname(__file__)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "worker.py"
    script.write_text(WORKER.format(paths=paths))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
        f"--master_port={port}", script, folder, output, str(stop),
    ]  # fmt: skip
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    cut(save_dense(folder / "dense", dtype=torch.float32), LAYOUT, folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def together(folder):
    ended = torchrun(folder, folder / "together")
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder / "together"


def test_two_processes_make_the_adapter_of_one_with_twice_the_passes(folder, together, tmp_path):
    train_job("B", **given(folder, tmp_path / "alone", accumulation=2))
    found, wanted = (load_file(where / "adapter_model.safetensors") for where in (together, tmp_path / "alone"))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)
    for table in ("training.csv", "held_out.csv"):
        ours, theirs = pd.read_csv(together / table), pd.read_csv(tmp_path / "alone" / table)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4)


def test_they_end_together_and_go_on_together(folder, together):
    output = folder / "interrupted"
    ended = torchrun(folder, output, stop=3)
    assert ended.returncode != 0 and not output.exists(), ended.stderr[-2000:]
    assert (folder / "interrupted.unfinished" / "state.safetensors").exists()
    again = torchrun(folder, output)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "goes on after step 3 of 8" in again.stdout
    assert (output / "adapter_model.safetensors").read_bytes() == (together / "adapter_model.safetensors").read_bytes()
