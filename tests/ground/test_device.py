import os
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from mistral_prune_lora import gpus
from mistral_prune_lora.device import Granted, batch_job, granted, resolve_device
from mistral_prune_lora.errors import DeviceError


@pytest.mark.parametrize(
    "name", ["meta", "xla", "mps", "cpu:1", "cuda:-1", "cuda:x", "cuda:123456789012", "", "gpu", "cpu\n"]
)
def test_what_is_not_computed_on_is_refused(name):
    with pytest.raises(DeviceError, match=r"is not a device \(in --device\)\. Use auto, cpu or cuda:N\."):
        resolve_device(name)


def test_the_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(DeviceError, match="cuda:99 is not there"):
        resolve_device("cuda:99")


@pytest.fixture
def machine(monkeypatch):
    """A machine without a GPU and outside of any cluster, whose threads are put back."""
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "SGE_ROOT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(threads)


def test_a_job_says_what_it_was_granted_and_uses_it(machine, capsys):
    assert granted(2, 0, 6000) == Granted("cpu", 5_200_000_000)
    assert torch.get_num_threads() == 2
    assert capsys.readouterr().err == "device cpu, 2 threads, memory 6.0 GB\n"
    assert granted(1, 0, 500).memory_bytes == 250_000_000  # of little, half
    assert granted(1, None, None) == Granted("cpu", None)
    assert capsys.readouterr().err.endswith("\ndevice cpu, 1 thread, memory as much as is free\n")


def test_a_gpu_is_taken_where_it_is_granted_or_nothing_is_said_of_it(machine, capsys):
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert granted(2, 1, 6000) == granted(2, None, 6000) == Granted("cuda:0", None)
    assert granted(3, 0, None).device == "cpu" and torch.get_num_threads() == 3
    assert capsys.readouterr().err.startswith("device cuda:0, 2 threads, memory 6.0 GB\n")


def test_a_granted_gpu_that_is_not_there_is_said_loudly_on_a_machine_of_one_s_own(machine, capsys):
    assert granted(2, 1, None).device == "cpu"
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "GRANTED A GPU, BUT TORCH SEES NONE: computing on the CPU with 2 threads"


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"])
def test_a_granted_gpu_that_is_not_there_ends_a_job_of_a_cluster(machine, name):
    machine.setenv(name, "4711")
    machine.setattr(torch.version, "cuda", None)
    message = (
        rf"torch \S+ is built without CUDA, CUDA_VISIBLE_DEVICES is not set \(in {name} 4711\)\. Install the torch"
    )
    with pytest.raises(DeviceError, match=message):
        granted(2, 1, 6000)
    machine.setattr(torch.version, "cuda", "12.4")
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match=r"is built for CUDA 12\.4, CUDA_VISIBLE_DEVICES is ''"):
        granted(2, 1, 6000)
    assert granted(2, 0, 6000).device == "cpu"


def test_grid_engine_is_told_by_more_than_a_job_id(machine):
    machine.setenv("JOB_ID", "12")
    assert batch_job() is None
    machine.setenv("SGE_ROOT", "/opt/sge")
    assert batch_job() == "JOB_ID 12"


HOLDS = "import sys, time; from mistral_prune_lora.gpus import own_gpu; print(own_gpu(2), flush=True); time.sleep(60)"


@pytest.fixture
def two_gpus(machine, tmp_path):
    """A machine with two of them, whose locks lie in a folder of the test's; a function that starts a job on one."""
    machine.setenv("TMPDIR", str(tmp_path))
    machine.setattr(tempfile, "tempdir", None)
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    machine.setattr(torch.cuda, "set_device", lambda device: None)
    machine.setattr(gpus, "_LOOK_AGAIN", 0.05)
    jobs = []

    def start() -> tuple[subprocess.Popen, str]:
        job = subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True)
        jobs.append(job)
        return job, job.stdout.readline().strip()

    yield start
    for job in jobs:
        job.kill()
        job.wait()
    for descriptor in gpus._held:
        os.close(descriptor)
    gpus._held.clear()


def test_jobs_on_one_machine_get_a_gpu_each_and_a_killed_one_leaves_it(two_gpus, capsys):
    first, number = two_gpus()
    assert number == "0" and granted(1, 1, None).device == "cuda:1"
    capsys.readouterr()
    threading.Timer(0.3, first.kill).start()
    assert granted(1, 1, None).device == "cuda:0"
    assert capsys.readouterr().err.startswith("all 2 GPUs are held by other jobs of yours: waiting for one (locks in ")


def test_gpus_are_locked_by_the_machine_s_names_for_them(two_gpus, machine):
    assert two_gpus()[1] == "0" and two_gpus()[1] == "1"
    machine.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert granted(1, 1, None).device == "cuda:1"  # the machine's third; its first is held
    machine.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43-ac33420d,GPU-0/../x")
    assert [granted(1, 1, None).device for _ in range(2)] == ["cuda:0", "cuda:1"]


def test_in_a_batch_job_what_the_cluster_shows_decides(two_gpus, machine, tmp_path):
    two_gpus()
    locks = set(tmp_path.rglob("*.lock"))
    machine.setenv("SLURM_JOB_ID", "4711")
    machine.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert granted(1, 1, None).device == "cuda:0" and set(tmp_path.rglob("*.lock")) == locks


def test_a_folder_of_somebody_else_is_not_locked_in(two_gpus, tmp_path):
    (tmp_path / f"mistral_prune_lora-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(DeviceError, match="cannot be taken: it is not a folder of yours"):
        granted(1, 1, None)
