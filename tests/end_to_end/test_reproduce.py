"""`luthier reproduce`, `luthier show` and `luthier diff`, on real runs and on their records."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.train_command import environment, record
from luthier.cli import reproduce, show


def luthier(folder, *words):
    return subprocess.run(
        [Path(sys.executable).with_name("luthier"), *words], cwd=folder, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.train
def test_a_run_is_repeated_bit_by_bit_from_its_record_alone(tiny, whole):
    done = luthier(tiny, "reproduce", "whole")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "identical: 7 lines of metrics, all results, and the final weights" in done.stdout
    assert record(tiny / "whole.again")["status"] == "finished"
    assert record(whole)["status"] == "finished"
    # The same check finds a single bit, and a single number.
    weights = tiny / "whole.again" / "model" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert reproduce.differing_weights(whole, tiny / "whole.again")[0].startswith("model/adapter")
    assert reproduce.report_differences(whole, tiny / "whole.again") == 1


@pytest.mark.train
def test_the_page_of_a_run_says_what_made_it(tiny, whole, capsys, monkeypatch):
    monkeypatch.chdir(tiny)
    assert show.run(["whole"]) == 0
    page = capsys.readouterr().out
    for part in ("finished", "lora.r=4", "1 process, sharding none", "eval_loss", "40 rows",
                 "checkpoint-8", "SHA-256", "torch"):  # fmt: skip
        assert part in page, page
    made = record(whole)
    for group, key in (
        ("model", "weights_sha256"), ("tokenizer", "sha256"), ("tokenizer", "template_sha256"),
        ("data", "sha256"),
    ):  # fmt: skip
        assert len(made[group][key]) == 64
    assert made["versions"]["pytest"] and made["format"] == 2
