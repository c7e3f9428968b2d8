import pytest
import torch

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import device
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
    "name",
    [
        pytest.param("cuda", marks=pytest.mark.skipif(HAS_CUDA, reason="has a CUDA device")),
        pytest.param("mps", marks=pytest.mark.skipif(HAS_MPS, reason="has an Apple GPU")),
    ],
)
def test_an_absent_device_is_told(name):
    with pytest.raises(UserError, match=rf"^model\.device={name}: torch sees no"):
        choose_machine(ModelConfig(path="x", device=name))


ATTENTION = {
    # what is installed and loads, the GPU's generation -> what auto takes
    "nothing": ((), 9, "sdpa"),
    "flash-attn": (("flash_attn", "kernels"), 9, "flash_attention_2"),
    "flash-attn 3": (("flash_attn", "flash_attn_interface"), 9, "flash_attention_3"),
    "flash-attn 3, another GPU": (("flash_attn_interface",), 8, "sdpa"),
    "kernels": (("kernels", "flash-attn2", "flash-attn3"), 9, "flash_attention_3"),
    "kernels, Ampere": (("kernels", "flash-attn2", "flash-attn3"), 8, "flash_attention_2"),
    "kernels without a build of one": (("kernels", "flash-attn2"), 9, "flash_attention_2"),
    "kernels that do not load": (("kernels",), 9, "sdpa"),
    "an older GPU": (("flash_attn", "kernels", "flash-attn2"), 7, "sdpa"),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_auto_takes_the_flash_attention_that_is_there(case, monkeypatch):
    present, generation, expected = ATTENTION[case]

    def load(name):
        if not any(name.endswith(each) for each in present):
            raise ImportError(name)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (generation, 0))
    monkeypatch.setattr(
        "transformers.modeling_flash_attention_utils.lazy_import_flash_attention", load
    )
    assert device._best_attention("cuda", "bfloat16") == expected
    assert device._best_attention("cuda", "float32") == "sdpa"


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_each_process_gets_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_machine(ModelConfig(path="x")).device == "cuda:0"
