"""Shares of weights by plain arithmetic, and the launch files that choose them."""

from pathlib import Path

import pytest

from luthier.errors import UserError
from luthier.memory import sharding as launchers
from luthier.memory.meta_model import Weight
from luthier.memory.sharding import ZERO_BUCKET, Sharding, process_memory

M = 1_000_000


def weight(name, millions, form="bfloat16", trains=False, layer="", embeds=False):
    size = {"bfloat16": 2, "float32": 4, "nf4": 0.5}[form]
    elements = millions * M
    return Weight(name, elements, (millions, M), int(elements * size), form, trains, layer, embeds)


LORA = [
    weight("embed", 100, embeds=True),
    weight("a.q", 40, layer="a"), weight("a.lora", 4, "float32", True, "a"),
    weight("b.q", 60, layer="b"), weight("b.lora", 6, "float32", True, "b"),
    weight("head", 100),
]  # fmt: skip
FULL = [
    weight("embed", 100, "float32", True, embeds=True),
    weight("a.q", 40, "float32", True, "a"), weight("b.q", 60, "float32", True, "b"),
]  # fmt: skip
QLORA = [weight("a.q", 40, "nf4", layer="a"), weight("a.lora", 4, "float32", True, "a")]

CASES = {
    "one process, adapters": (
        Sharding(), LORA, {"bfloat16": 600 * M}, {"float32": 40 * M}, {}
    ),
    "DDP: buckets as large as the gradients": (
        Sharding("ddp", 4), LORA, {"bfloat16": 600 * M}, {"float32": 40 * M}, {"buckets": 40 * M}
    ),
    "FSDP2: the head and two layers are gathered": (
        Sharding("fsdp2", 4), LORA, {"bfloat16": 150 * M}, {"float32": 10 * M},
        {"gathered": 2 * (100 + 2 * 66) * M, "buckets": 2 * 4 * 6 * M},
    ),
    "FSDP2: copies of slices": (
        Sharding("fsdp2", 8, copies=2), LORA, {"bfloat16": 150 * M}, {"float32": 10 * M},
        {"gathered": 2 * (100 + 2 * 66) * M, "buckets": 2 * 4 * 6 * M},
    ),
    "FSDP2 without resharding gathers all layers": (
        Sharding("fsdp2", 4, reshard=False), LORA, {"bfloat16": 150 * M}, {"float32": 10 * M},
        {"gathered": 2 * (100 + 66 + 44) * M, "buckets": 2 * 4 * 6 * M},
    ),
    "FSDP2 of all weights: slices in float32": (
        Sharding("fsdp2", 4), FULL, {}, {"float32": 200 * M},
        {"gathered": 2 * (100 + 2 * 60) * M, "buckets": 2 * 4 * 100 * M},
    ),
    "FSDP2 leaves 4-bit weights whole": (
        Sharding("fsdp2", 4), QLORA, {"nf4": 20 * M}, {"float32": 4 * M},
        {"gathered": 2 * 2 * 4 * M, "buckets": 2 * 4 * 4 * M},
    ),
    "ZeRO-2: weights in 16 bits, the optimizer's copy in slices": (
        Sharding("zero2", 4), FULL, {}, {"16 bits": 400 * M},
        {"master": 200 * M, "buckets": 2 * ZERO_BUCKET},
    ),
    "ZeRO-3: all in slices": (
        Sharding("zero3", 4), FULL, {}, {"16 bits": 100 * M},
        {"master": 200 * M, "buckets": 2 * ZERO_BUCKET, "gathered": 400 * M},
    ),
    "ZeRO-2, the optimizer in main memory": (
        Sharding("zero2", 4, offload_optimizer=True), FULL, {}, {"16 bits": 400 * M},
        {"buckets": 2 * ZERO_BUCKET},
    ),
}  # fmt: skip


@pytest.mark.parametrize("sharding, given, frozen, trained, more", CASES.values(), ids=CASES)
def test_what_a_process_holds(sharding, given, frozen, trained, more):
    found = process_memory(sharding, given, half=True)
    assert (found.weights, found.trained) == (frozen, trained)
    kept = {"master": found.master, "buckets": found.buckets, "gathered": found.gathered}
    assert {name: size for name, size in kept.items() if size} == more


SHARES = {
    "one process": (Sharding(), True, 1),
    "DDP": (Sharding("ddp", 4), True, 1),
    "FSDP2, all weights: from 16 bits to float32": (Sharding("fsdp2", 4), True, 0.5),
    "FSDP2, copies of slices": (Sharding("fsdp2", 8, copies=2), False, 0.25),
    "FSDP2, adapters: float32 as they are": (Sharding("fsdp2", 4), False, 0.25),
    "ZeRO, all weights: 16 bits as they are": (Sharding("zero3", 4), True, 0.25),
    "ZeRO, adapters: from float32 to 16 bits": (Sharding("zero2", 4), False, 0.125),
}


@pytest.mark.parametrize("sharding, full, share", SHARES.values(), ids=SHARES)
def test_the_share_of_gradients_that_stays(sharding, full, share):
    assert sharding.gradient_share(full, half=True) == share


ACCUMULATED = {
    "FSDP2, all weights: whole in float32": (Sharding("fsdp2", 4), True, 2),
    "FSDP2, adapters: whole as they are": (Sharding("fsdp2", 4), False, 1),
    "ZeRO: in slices after each micro-batch": (Sharding("zero2", 4), True, 0.25),
}


@pytest.mark.parametrize("sharding, full, share", ACCUMULATED.values(), ids=ACCUMULATED)
def test_the_share_of_gradients_between_micro_batches(sharding, full, share):
    assert sharding.gradient_share(full, half=True, accumulates=True) == share


LAUNCH = Path(__file__).parents[2] / "launch"
FILES = {
    "cpu.yaml": Sharding(),
    "cpu_ddp.yaml": Sharding("ddp", 2),
    "single_gpu.yaml": Sharding(),
    "ddp.yaml": Sharding("ddp", 8),
    "fsdp2.yaml": Sharding("fsdp2", 8),
    "zero2.yaml": Sharding("zero2", 8),
    "zero3.yaml": Sharding("zero3", 8),
}


@pytest.mark.parametrize("name", FILES)
def test_each_launch_file_is_read(name):
    assert {path.name for path in LAUNCH.glob("*.yaml")} == set(FILES)
    assert launchers.read_sharding(str(LAUNCH / name)) == FILES[name]


def test_the_number_of_processes_wins_over_the_file():
    assert launchers.read_sharding(str(LAUNCH / "fsdp2.yaml"), 4) == Sharding("fsdp2", 4)


def test_copies_of_slices_are_counted(tmp_path):
    file = tmp_path / "launch.yaml"
    sizes = "parallelism_config: {parallelism_config_dp_replicate_size: 2}\n"
    file.write_text((LAUNCH / "fsdp2.yaml").read_text() + sizes)
    assert launchers.read_sharding(str(file)) == Sharding("fsdp2", 8, copies=2)


WRONG = {
    "nothing there": (None, "cannot be read: No such file"),
    "no YAML": ("a: [", "this is no YAML"),
    "no config": ("- a", "this is no config file of accelerate"),
    "FSDP1": ("distributed_type: FSDP", "fsdp_version: 1"),
    "split rows": (
        "distributed_type: FSDP\nparallelism_config: {parallelism_config_cp_size: 2}",
        "parallelism_config_cp_size: 2 .a run refuses it. is not counted",
    ),
    "ZeRO-1": ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}", "zero_stage: 1"),
    "other": ("distributed_type: MEGATRON_LM", "distributed_type: MEGATRON_LM is not counted"),
}


@pytest.mark.parametrize("text, said", WRONG.values(), ids=WRONG)
def test_other_files_are_refused_in_words(text, said, tmp_path):
    file = tmp_path / "launch.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said):
        launchers.read_sharding(str(file))
