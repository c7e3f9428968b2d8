"""Copies of slices over four processes on CPUs (hybrid sharding), against one process."""

import pytest

from helpers import fsdp_cpu
from helpers.train_command import record, said, words

pytestmark = pytest.mark.train

SIZES = {"dp_replicate_size": 2, "dp_shard_size": 2}


def test_copies_of_slices_train_as_one_process(forks, tiny):
    # accelerate 1.15 takes these sizes from a config file alone, together with FSDP.
    file = tiny / "hybrid.yaml"
    sizes = "".join(f"  parallelism_config_{name}: {size}\n" for name, size in SIZES.items())
    file.write_text(f"{fsdp_cpu.LAUNCH_FILE.read_text()}parallelism_config:\n{sizes}")
    args = {"save_steps": 4, "max_steps": 4}
    hybrid = fsdp_cpu.fork_fsdp(
        forks, tiny, *words(tiny, **args), "output_dir=hybrid",
        ranks=4, flags=("--config_file", str(file)),
    )  # fmt: skip
    assert hybrid.code == 0, hybrid.text[-3000:]
    launch = record(hybrid.folder)["launch"]
    assert (launch["sharding"], launch["processes"]) == ("fsdp2", 4)
    line = words(tiny, save_strategy="no", max_steps=4, per_device_train_batch_size=8)
    assert forks.run(tiny, *line, "output_dir=hybrid-one") == 0, said(tiny)[-3000:]
    saved = fsdp_cpu.saved_weights(hybrid.folder / "model")
    expected = fsdp_cpu.saved_weights(tiny / "hybrid-one" / "model")
    assert fsdp_cpu.largest_difference(saved, expected) < 1e-6
    assert fsdp_cpu.largest_difference(saved, hybrid.gathered_weights()) == 0
    losses = [record(run)["results"]["eval_loss"] for run in (hybrid.folder, tiny / "hybrid-one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
