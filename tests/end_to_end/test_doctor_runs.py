"""`luthier doctor --test` on this machine's CPUs, right and with kernels that are wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from luthier.doctor.path_tests import run_path_tests
from luthier.doctor.training_paths import list_training_paths

CALL = "from luthier.cli.main import main; main()"


def doctor(folder, *words, **variables):
    done = subprocess.run(
        [sys.executable, "-c", CALL, "doctor", "--json", *words],
        cwd=folder, env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"} | variables,
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    facts = json.loads(done.stdout)
    return done.returncode, {path["name"]: path for path in facts["paths"]}, facts["holds"]


def test_every_path_of_a_cpu_is_right(tmp_path):
    code, paths, holds = doctor(tmp_path, "--test")
    states = {name: path["state"] for name, path in paths.items()}
    reasons = {name: path["reason"] for name, path in paths.items() if path["reason"]}
    absent = {"packed-flash_attention_2", "packed-flash_attention_3", "fsdp2"}
    if states["compile"] == "not here":
        absent.add("compile")
    assert {name for name, state in states.items() if state != "right"} == absent, reasons
    assert reasons["fsdp2"] == "there is no GPU, and accelerate shards only over GPUs"
    assert (code, holds) == (0, True)
    # 16 bits were used where they are named, and 8 bits: the differences say so.
    assert 1e-4 < paths["bf16"]["gradient_difference"] < 5e-2
    assert 1e-4 < paths["int8"]["gradient_difference"] < 1e-1
    assert (paths["ddp"]["sharding"], paths["ddp"]["processes"]) == ("ddp", 2)
    assert paths["ddp"]["losses"][0] > paths["ddp"]["losses"][-1]
    assert all(path["tokens_per_second"] > 0 for path in paths.values() if path["state"] == "right")
    # Neither runs nor caches are left.
    assert list(tmp_path.iterdir()) == []


BREAKS = {
    # A kernel that is one percent off.
    "transformers.integrations.sdpa_attention": """
real_forward = sdpa_attention_forward
def sdpa_attention_forward(*args, **kwargs):
    output, weights = real_forward(*args, **kwargs)
    return output * 1.01, weights
""",
    # One that takes its process with it.
    "bitsandbytes.autograd._functions": """
def matmul(*args, **kwargs):
    import os
    os.abort()
""",
    # One that this machine has not.
    "torch.utils.checkpoint": """
def checkpoint(*args, **kwargs):
    raise RuntimeError("no kernel image is available\\nwith lines behind it")
""",
}
HOOK = """
import importlib.abc, importlib.util, json, sys

class Breaker(importlib.abc.MetaPathFinder):
    def __init__(self):
        self.breaks = BREAKS

    def find_spec(self, name, path, target=None):
        source = self.breaks.pop(name, None)
        if source is None:
            return None
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module
        def exec_module(module):
            real(module)
            exec(source, vars(module))
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Breaker())
"""


def test_a_wrong_kernel_is_found(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HOOK.replace("BREAKS", repr(BREAKS)))
    only = "int8,packed-eager,packed-sdpa,checkpointing"
    code, paths, holds = doctor(tmp_path, "--only", only, PYTHONPATH=str(site))
    assert (code, holds) == (1, False)
    assert {name: path["state"] for name, path in paths.items()} == {
        "int8": "wrong", "packed-eager": "right", "packed-sdpa": "wrong", "checkpointing": "wrong",
    }  # fmt: skip
    assert paths["int8"]["reason"].startswith("its process ended with SIGABRT")
    assert "its gradient differs by" in paths["packed-sdpa"]["reason"]
    assert paths["packed-sdpa"]["gradient_difference"] > 1e-3
    assert paths["checkpointing"]["reason"] == "RuntimeError: no kernel image is available"
    assert paths["checkpointing"]["advice"] == "set trainer.args.activation_checkpointing=false"


ON_CPU = """
import sys
sys.path.insert(0, TESTS)
from helpers.fsdp_cpu import choose_fsdp_on_cpu
choose_fsdp_on_cpu()
"""


def test_fsdp2_is_held_against_float32_as_on_gpus(tmp_path, monkeypatch):
    """By the path's own launch; the patch of a test lets accelerate shard over CPUs."""
    source = ON_CPU.replace("TESTS", repr(str(Path(__file__).parents[1])))
    hook = HOOK.replace("BREAKS", repr({"luthier.config.load": source}))
    (tmp_path / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fsdp2 = next(path for path in list_training_paths() if path.name == "fsdp2")
    (result,) = run_path_tests([replace(fsdp2, missing=None)], lambda result: None)
    assert (result.state, result.reason) == ("right", None)
    assert result.numbers["sharding"] == "fsdp2"
