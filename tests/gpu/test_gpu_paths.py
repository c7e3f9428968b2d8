"""`luthier doctor --test` on this machine's GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch

CALL = "from luthier.cli.main import main; main()"
GPUS = torch.cuda.device_count()


@pytest.mark.train
@pytest.mark.skipif(GPUS == 0, reason="torch sees no CUDA GPU on this machine")
def test_every_path_of_a_gpu_is_right(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CALL, "doctor", "--test", "--json"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout, done.stderr
    facts = json.loads(done.stdout)
    paths = {path["name"]: path for path in facts["paths"]}
    wrong = {name: path["reason"] for name, path in paths.items() if path["state"] == "wrong"}
    assert wrong == {}
    assert done.returncode == 0
    assert len(facts["gpus"]) == GPUS
    expected = {"float32", "lora", "nf4", "int8", "packed-sdpa", "packed-varlen", "checkpointing"}
    expected |= {"bf16"} if facts["gpus"]["0"]["bf16"] else set()
    expected |= {"ddp", "fsdp2"} if GPUS > 1 else set()
    assert expected <= {name for name, path in paths.items() if path["state"] == "right"}
    for name in expected - {"ddp", "fsdp2"}:
        assert 0 < paths[name]["peak_bytes"] <= 2 * paths[name]["planned_bytes"]
