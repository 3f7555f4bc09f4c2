import pytest
import torch

from mistral_prune_lora.device import resolve_device
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
