"""FSDP2 over two processes on CPUs, as `launch/fsdp2.yaml` says, against one process.

Two processes with two rows each must end with the weights of one process with four, in float32;
what checkpoints hold and how runs resume stands in `test_fsdp_checkpoints.py`.
"""

import json

import pytest

from helpers import fsdp_cpu, train_command
from helpers.model_families import save_family
from helpers.preference_trainer import PREFERENCES

LORA = ("lora=default", "lora.r=4", "lora.lora_dropout=0.0")
NF4 = (*LORA, "quantization=nf4")
REPLIES = (
    "trainer.evaluation.samples=3", "trainer.evaluation.metrics=[exact_match]",
    "trainer.evaluation.when=evaluations", "trainer.evaluation.max_new_tokens=8",
)  # fmt: skip
# The steps of plain gradient descent show a wrong gradient; Adam's would round it off.
SGD = {"optim": "sgd", "learning_rate": 0.1}
TWICE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}


def command(folder, base, more, **args):
    """The words of a run of four steps, each of which is logged; `more` replaces them."""
    args = {
        "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
    } | args  # fmt: skip
    line = [*train_command.words(folder, **args), "dataset.eval.count=7"]
    if base is not None:
        line.append(f"model.path={base}")
    return list({word.partition("=")[0]: word for word in [*line, *more]}.values())


def preferences(folder):
    """A file of pairs of replies, and the words that name it."""
    file = folder / "pairs.jsonl"
    rows = [
        {**row, "prompt": [{"role": "user", "content": f"({n}) {row['prompt'][0]['content']}"}]}
        for n in range(6)
        for row in PREFERENCES
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return ("trainer=dpo", f"dataset.path={file}", "chat.max_length=128",
            "chat.empty_replies=train")  # fmt: skip


def numbers(run):
    """The logged rows without times, and without the operations, which count padding."""
    return [
        {key: value for key, value in row.items() if key not in ("total_flos", "epoch")}
        for row in train_command.metrics(run)
    ]


@pytest.mark.parametrize(
    ("name", "family", "more", "args"),
    [
        pytest.param(
            "full", None, REPLIES,
            TWICE | {"max_grad_norm": 0.1, "eval_strategy": "steps", "eval_steps": 2},
            id="full-with-accumulation-clipping-and-replies-at-evaluations",
        ),
        pytest.param(
            "packed", None, LORA,
            TWICE | {"packing": "true", "eval_packing": "true", "eval_strategy": "steps"},
            id="lora-on-packed-rows",
        ),
        pytest.param(
            "recomputed", "qwen2", (), {"activation_checkpointing": "true"} | SGD,
            id="tied-embeddings-with-activation-checkpointing",
        ),
        pytest.param("experts", "qwen3_moe", LORA, SGD, id="lora-on-experts"),
        pytest.param("images", "qwen3_vl", (), SGD, id="the-output-layer-of-a-model-of-images"),
        pytest.param(
            "head", "qwen3_vl", (*LORA, "lora.modules_to_save=[lm_head]"), SGD,
            id="an-output-layer-beside-an-adapter",
        ),
        pytest.param("ia3", None, ("lora=ia3",), {"learning_rate": 0.01}, id="ia3"),
        pytest.param("buffers", "deepseek_v3", LORA, SGD, id="buffers-among-the-weights"),
        pytest.param("tokens", None, (*LORA, "model.add_tokens=[hello]"), SGD, id="new-tokens"),
        pytest.param("nf4", "qwen3_moe", NF4, SGD, id="qlora-with-experts-in-4-bits"),
        pytest.param(
            "stored", None, (*NF4, *REPLIES, "+quantization.bnb_4bit_quant_storage=bfloat16"),
            SGD | {"eval_strategy": "steps", "eval_steps": 2}, id="qlora-in-slices",
        ),
        pytest.param("dpo", None, LORA, SGD, id="dpo-against-the-model-without-its-adapter"),
    ],
)  # fmt: skip
def test_two_processes_train_as_one(forks, tiny, name, family, more, args):
    base = None if family is None else save_family(tiny / f"base_{name}", family)
    more = (*more, *(preferences(tiny) if name == "dpo" else ()))
    line = command(tiny, base, more, **args)
    sharded = fsdp_cpu.fork_fsdp(forks, tiny, *line, f"output_dir=fsdp_{name}")
    assert sharded.code == 0, sharded.text
    record = train_command.record(sharded.folder)
    assert (record["launch"]["sharding"], record["launch"]["processes"]) == ("fsdp2", 2)

    size = 2 * args.get("per_device_train_batch_size", 2)
    line = command(tiny, base, more, **args | {"per_device_train_batch_size": size})
    one = tiny / f"one_{name}"
    assert forks.run(tiny, *line, f"output_dir={one.name}") == 0, train_command.said(tiny)
    reference, saved = (fsdp_cpu.saved_weights(run / "model") for run in (one, sharded.folder))
    # Weights are about 1 in size, and the adapters of experts learn fast.
    assert fsdp_cpu.largest_difference(saved, reference) < 1e-6
    logged = numbers(one)
    assert len(logged) >= 6
    assert numbers(sharded.folder) == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in logged]
    assert (sharded.folder / "replies.jsonl").read_text() == (one / "replies.jsonl").read_text()


def test_mixed_precision_rounds_no_loss(forks, tiny):
    """The file's own bf16, with float32 adapters on a bfloat16 base."""
    line = command(tiny, None, (*LORA, "model.dtype=bfloat16"), **SGD)
    sharded = fsdp_cpu.fork_fsdp(forks, tiny, *line, "output_dir=fsdp_bf16", precision=None)
    assert sharded.code == 0, sharded.text
    assert train_command.record(sharded.folder)["launch"]["precision"] == "bf16"
    line = command(tiny, None, LORA, **SGD | {"per_device_train_batch_size": 4})
    assert forks.run(tiny, *line, "output_dir=one_float32") == 0, train_command.said(tiny)
    rows = zip(numbers(sharded.folder), numbers(tiny / "one_float32"), strict=True)
    for row, exact in rows:
        # Rounded to bfloat16 a loss of 5.69 is off by up to 0.016.
        losses = {key: value for key, value in exact.items() if key.endswith("loss")}
        assert {key: row[key] for key in losses} == pytest.approx(losses, abs=1e-3)
    weights = sharded.gathered_weights()
    adapters = [weight for name, weight in weights.items() if "lora_" in name]
    assert {str(weight.dtype) for weight in adapters} == {"torch.float32"}
    assert any(bool((weight != weight.bfloat16().float()).any()) for weight in adapters)


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
    one = train_command.record(tiny / "fsdp_one")["results"]["eval_loss"]
    two = record["results"]["eval_loss"]
    assert two["before"] == pytest.approx(one["before"], abs=1e-5)
    assert two["after"] == pytest.approx(one["after"], abs=1e-5)
