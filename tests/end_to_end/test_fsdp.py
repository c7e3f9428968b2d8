"""FSDP2 over two processes on CPUs, as `launch/fsdp2.yaml` says, against one process."""

import pytest

from helpers import fsdp_cpu, train_command


def test_the_launch_file_trains_as_one_process_does(forks, tiny):
    args = {"save_strategy": "no", "eval_strategy": "no"}
    line = train_command.words(tiny, **args)
    sharded = fsdp_cpu.launch_fsdp(tiny, *line, "output_dir=fsdp")
    assert sharded.code == 0, sharded.text
    record = train_command.record(sharded.folder)
    assert record["launch"]["sharding"] == "fsdp2"
    assert record["launch"]["processes"] == 2

    line = train_command.words(tiny, **args, per_device_train_batch_size=4)
    assert forks.run(tiny, *line, "output_dir=fsdp_one") == 0, train_command.said(tiny)
    reference = fsdp_cpu.saved_weights(tiny / "fsdp_one" / "model")
    assert fsdp_cpu.largest_difference(sharded.gathered_weights(), reference) < 1e-6
    saved = fsdp_cpu.saved_weights(sharded.folder / "model")
    assert fsdp_cpu.largest_difference(saved, sharded.gathered_weights()) == 0
    one = train_command.record(tiny / "fsdp_one")["results"]["held_out_loss"]
    two = record["results"]["held_out_loss"]
    assert two["before"] == pytest.approx(one["before"], abs=1e-5)
    assert two["after"] == pytest.approx(one["after"], abs=1e-5)
