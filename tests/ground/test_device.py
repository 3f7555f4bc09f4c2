import pytest
import torch

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
