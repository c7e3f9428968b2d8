import pytest
import torch

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.device import Machine, choose_machine

HAS_CUDA = torch.cuda.is_available()
HAS_MPS = torch.backends.mps.is_available()


def test_auto_decides_everything():
    machine = choose_machine(ModelConfig(path="x"))
    assert machine.device_type in ("cuda", "mps", "cpu")
    assert machine.dtype in ("float32", "bfloat16")
    assert machine.attention in ("sdpa", "flash_attention_2", "flash_attention_3")


def test_a_cpu_computes_in_bfloat16_only_with_amx():
    wanted = "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"
    assert choose_machine(ModelConfig(path="x", device="cpu")) == Machine("cpu", wanted, "sdpa")


def test_what_is_configured_is_taken():
    config = ModelConfig(path="x", device="cpu", dtype="float16", attention="eager")
    assert choose_machine(config) == Machine("cpu", "float16", "eager")


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda", marks=pytest.mark.skipif(HAS_CUDA, reason="has a CUDA device")),
        pytest.param("mps", marks=pytest.mark.skipif(HAS_MPS, reason="has an Apple GPU")),
    ],
)
def test_an_absent_device_is_told(device):
    with pytest.raises(UserError, match=rf"^model\.device={device}: torch sees no"):
        choose_machine(ModelConfig(path="x", device=device))


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_each_process_gets_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_machine(ModelConfig(path="x")).device == "cuda:0"
