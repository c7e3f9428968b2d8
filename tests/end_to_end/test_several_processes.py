"""DDP over gloo: four processes, two machines and two SLURM nodes train as one process does."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from helpers import train_command
from helpers.fsdp_cpu import largest_difference, saved_weights
from helpers.judge_server import judging
from helpers.train_command import launch_ranks

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
# Steps that are linear in the gradients, so that a row that trains twice is seen.
ARGS = {
    "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0, "max_steps": 8, "save_strategy": "no",
    "eval_strategy": "no", "per_device_eval_batch_size": 3,
}  # fmt: skip
# 40 rows, 14 packed ones: neither 12 nor 8 divide them, and some ranks have none in the last batch.
WAYS = {
    "rows": (3, ()),
    "packed": (2, ("trainer.args.packing=true", "chat.max_length=64")),
    "stream": (3, ("dataset.streaming=true", "dataset.eval.count=null")),
    "packed-stream": (
        2, ("dataset.streaming=true", "dataset.eval.count=null", "trainer.args.packing=true"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_four_processes_train_as_one(forks, tiny, way):
    size, more = WAYS[way]
    four = train_command.words(tiny, **ARGS, per_device_train_batch_size=size)
    codes, text = launch_ranks(forks, tiny, *four, *more, f"output_dir=four-{way}", ranks=4)
    assert codes == [0] * 4, text[-3000:]
    assert "find_unused_parameters" not in text, "torch has looked for what is not there"
    one = train_command.words(tiny, **ARGS, per_device_train_batch_size=4 * size)
    assert forks.run(tiny, *one, *more, f"output_dir=one-{way}") == 0, train_command.said(tiny)
    weights = [saved_weights(tiny / f"{name}-{way}" / "model") for name in ("four", "one")]
    base = saved_weights(tiny / "model")
    assert largest_difference(weights[0], weights[1]) < 1e-5
    assert largest_difference(weights[1], base) > 1e-2
    # Of 8 held-out rows the last rank has none, and none counts twice.
    results = [
        train_command.record(tiny / f"{name}-{way}")["results"].get("eval_loss", {})
        for name in ("four", "one")
    ]
    assert bool(results[0]) == (way in ("rows", "packed"))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def make_switch_transformer(tiny):
    """A model whose experts are a module each, of which a step runs a few; rows for it."""
    tokens = train_command.tokenizer()
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=32, num_heads=4, num_experts=32,
        num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, dropout_rate=0.0, router_jitter_noise=0.0,
        pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id,
        decoder_start_token_id=tokens.pad_token_id,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    model.save_pretrained(tiny / "switch")
    tokens.save_pretrained(tiny / "switch")
    rows = (tiny / "rows.jsonl").read_text()
    rows = rows.replace('"prompt"', '"source"').replace('"completion"', '"target"')
    (tiny / "sources.jsonl").write_text(rows)


def test_experts_that_a_step_leaves_out_train_as_in_one_process(forks, tiny):
    make_switch_transformer(tiny)
    args = {**ARGS, "max_steps": 3, "learning_rate": 0.1}
    more = ["trainer=seq2seq", f"model.path={tiny / 'switch'}", "model.attention=eager"]
    more += [f"dataset.path={tiny / 'sources.jsonl'}"]
    two = [*train_command.words(tiny, **args, per_device_train_batch_size=1), *more]
    codes, text = launch_ranks(forks, tiny, *two, "output_dir=two-switch")
    assert codes == [0, 0], text[-3000:]
    one = [*train_command.words(tiny, **args, per_device_train_batch_size=2), *more]
    assert forks.run(tiny, *one, "output_dir=one-switch") == 0, train_command.said(tiny)[-3000:]
    weights = [saved_weights(tiny / f"{name}-switch" / "model") for name in ("two", "one")]
    assert largest_difference(weights[0], weights[1]) < 1e-5
    base = saved_weights(tiny / "switch")
    experts = [name for name in base if ".experts." in name]
    moved = [name for name in experts if not torch.equal(base[name], weights[0][name])]
    assert 0 < len(moved) < len(experts)

    # Where the user takes the search away, the first step says which weights would part.
    codes, text = launch_ranks(
        forks, tiny, *two, "trainer.args.ddp_find_unused_parameters=false", "output_dir=parted"
    )
    assert 2 in codes, text[-3000:]
    assert "Step 1: encoder.block.1.layer.1.mlp.experts.expert_" in text
    assert "Set trainer.args.ddp_find_unused_parameters=true" in text
    assert "Traceback" not in text


# Each process draws completions of its own (TRL seeds each rank apart), so no run of two processes
# has those of one. With the same completions, all that follows is the same: rewards, groups that
# span ranks, advantages, the mean over tokens.
COMPLETIONS = """
from luthier.train.methods.online import OnlineTrainerMixin


def complete(self, prompt_ids, *rest, **more):
    made = []
    for number, ids in enumerate(prompt_ids):
        again = number % 2
        made.append([40 + (sum(ids) + 11 * again + at) % 200 for at in range(3 + again)] + [1])
    return made if "RLOO" in str(type(self).__mro__) else (made, None)


OnlineTrainerMixin._generate_single_turn = complete


def reward(completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]
"""


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_two_processes_learn_from_the_same_completions_as_one(forks, tiny, method):
    (tiny / "completions.py").write_text(COMPLETIONS)
    args = {
        **ARGS,
        "max_steps": 3,
        "learning_rate": 0.05,
        "num_generations": 2,
        "max_completion_length": 8,
        "per_device_eval_batch_size": 4,
    }
    more = (f"trainer={method}", "trainer.rewards=['python:completions.reward']")
    for name, size in (("two", 4), ("one", 8)):
        line = train_command.words(tiny, **args, per_device_train_batch_size=size)
        line += [*more, "trainer.args.gradient_accumulation_steps=1", f"output_dir={name}-{method}"]
        where = {"PYTHONPATH": str(tiny)}
        if name == "two":
            codes, text = launch_ranks(forks, tiny, *line, **where)
            assert codes == [0, 0], text[-3000:]
        else:
            assert forks.run(tiny, *line, **where) == 0, train_command.said(tiny)[-3000:]
    weights = [saved_weights(tiny / f"{name}-{method}" / "model") for name in ("two", "one")]
    assert largest_difference(weights[0], weights[1]) < 1e-5
    assert largest_difference(weights[1], saved_weights(tiny / "model")) > 1e-3


def test_a_judge_that_fails_in_one_process_stops_both_with_a_checkpoint(forks, tiny):
    """Else the other one would wait for its rewards for ever."""
    metrics, refuses = tiny / "judged" / "metrics.jsonl", [True]

    def answer(body, number):
        steps = metrics.read_text().count('"loss"') if metrics.is_file() else 0
        if refuses[0] and steps >= 2:
            refuses[0] = False  # a single request, of one process
            return 400, "out of credit"
        return str(len(body["messages"][0]["content"]) % 5)

    args = {**ARGS, "max_steps": 4, "logging_steps": 1, "num_generations": 2}
    args |= {"max_completion_length": 8, "per_device_train_batch_size": 2}
    args |= {"per_device_eval_batch_size": 4}
    with judging(answer) as judge:
        reward = f"{{judge: '{judge.address}', model: m, prompt: '{{reply}}'}}"
        line = train_command.words(tiny, **args)
        line += ["trainer=grpo", f"trainer.rewards=[{reward}]", "output_dir=judged"]
        line += ["trainer.args.gradient_accumulation_steps=1"]
        codes, text = launch_ranks(forks, tiny, *line)
        assert codes == [2, 2], text[-3000:]
        assert "out of credit" in text and "The 2 steps before it are saved" in text
        codes, text = launch_ranks(forks, tiny, *line)
        assert codes == [0, 0], text[-3000:]
        assert "resuming at step 2" in text
        assert metrics.read_text().count('"loss"') == 4


def test_bad_input_of_a_launch_is_said_before_it_trains(forks, tiny):
    line = train_command.words(tiny, **ARGS)
    rows = (tiny / "rows.jsonl").read_text()
    (tiny / "other.jsonl").write_text(rows.replace("mat", "hat", 1))
    data = "dataset.path='${oc.env:ROWS}'"

    def with_rows(name):
        file = {0: "rows.jsonl", 1: name}
        return lambda rank: ((data,), {"ROWS": str(tiny / file[rank])})

    eager = ("model.attention=eager",)
    cases = [
        (lambda rank: ((f"seed={rank}",), {}), "seed (config): 0 on rank 0 ("),
        (lambda rank: (("model.dtype=bfloat16",) * rank, {}), "model.dtype: float32 on rank 0 ("),
        (lambda rank: (eager * rank, {}), "model.attention (config): 'sdpa' on rank 0 ("),
        (with_rows("other.jsonl"), "rows, or what trains in them: "),
    ]
    for per_rank, message in cases:
        codes, text = launch_ranks(forks, tiny, *line, "output_dir=bad", per_rank=per_rank)
        assert codes == [2, 2], text
        assert message in text
        assert "Traceback" not in text
        assert "mean" not in text.partition("before")[2], "it was measured"
        assert not (tiny / "bad").exists()
    held = tuple(w for w in line if not w.startswith("dataset.eval"))
    for more, count in (
        (("dataset.eval.count=46",), "3 processes train together, but there are 2 rows"),
        (("trainer.args.packing=true", "dataset.eval.count=44"), "there are 2 packed rows of 64"),
    ):
        codes, text = launch_ranks(forks, tiny, *held, *more, "output_dir=bad", ranks=3)
        assert codes == [2] * 3, text
        assert count in text
        assert "Traceback" not in text


def test_a_port_in_use_is_named(forks, tiny):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        variables = {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        line = train_command.words(tiny, **ARGS)
        assert forks.run(tiny, *line, "output_dir=port", limit=60, **variables) == 2
    text = train_command.said(tiny).rpartition("The port at which")[2]
    assert f"(127.0.0.1:{port}) is in use by another program" in text
    assert "Traceback" not in text


def two_machines(tiny, name, **own):
    """Two ranks on each of two machines, which have caches of their own."""

    def settings(rank):
        node = str(rank // 2)
        variables = {
            "LOCAL_RANK": str(rank % 2), "GROUP_RANK": node, "LOCAL_WORLD_SIZE": "2",
            "NODE_CACHE": str(tiny / f"{name}-cache-{node}"),
            "NODE_OUTPUT": str(tiny / (f"{name}-{node}" if own.get("local_output") else name)),
        }  # fmt: skip
        return ("dataset.cache='${oc.env:NODE_CACHE}'", "output_dir='${oc.env:NODE_OUTPUT}'"), (
            variables
        )

    return settings


def test_two_machines_share_one_run(forks, tiny):
    size, _ = WAYS["rows"]
    args = {**ARGS, "save_strategy": "steps", "save_steps": 4}
    line = train_command.words(tiny, **args, per_device_train_batch_size=size)
    line = [word for word in line if not word.startswith("dataset.cache")]
    codes, text = launch_ranks(forks, tiny, *line, ranks=4, per_rank=two_machines(tiny, "machines"))
    assert codes == [0] * 4, text[-3000:]
    four = train_command.words(tiny, **ARGS, per_device_train_batch_size=size)
    assert launch_ranks(forks, tiny, *four, "output_dir=one-machine", ranks=4)[0] == [0] * 4
    assert train_command.weights(tiny / "machines") == train_command.weights(tiny / "one-machine")
    # Each machine encoded the rows once, into its own cache.
    entries = [
        [path.parent.name for path in (tiny / f"machines-cache-{node}").rglob("rows.arrow")]
        for node in "01"
    ]
    assert len(entries[0]) == 1 and entries[0] == entries[1]
    assert text.count("is not shared") == 0

    # Folders of their own: said at the start, and nothing goes on from half a checkpoint.
    codes, text = launch_ranks(
        forks, tiny, *line, ranks=4, per_rank=two_machines(tiny, "local", local_output=True)
    )
    assert codes == [0] * 4, text[-3000:]
    assert text.count("is not shared: ranks 2-3 (") == 1
    assert train_command.weights(tiny / "local-0") == train_command.weights(tiny / "machines")
    assert not (tiny / "local-1" / "model").exists()
    assert not (tiny / "local-1" / "run.json").exists()
    longer = [word.replace("max_steps=8", "max_steps=10") for word in line]
    codes, text = launch_ranks(
        forks, tiny, *longer, ranks=4, per_rank=two_machines(tiny, "local", local_output=True)
    )
    assert codes == [2] * 4, text
    assert "ranks 2-3 (" in text
    assert "cannot see their part" in text
    assert "Traceback" not in text


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
code=0
for task in 1 2; do wait -n || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "requeued $2" >> "$SLURM_SUBMIT_DIR/queue.txt"; exit; fi
printf '127.0.0.1\\nlocalhost\\n'
"""


@pytest.mark.long
def test_slurm_runs_two_machines_stops_and_goes_on(forks, tiny, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    folder = Path(train_command.ACCELERATE).parent
    (tmp_path / "bin" / "activate").write_text(f'PATH="{folder}:$PATH"\n')
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    line = train_command.words(
        tiny, **ARGS | {"max_steps": 150}, per_device_train_batch_size=2, logging_steps=1
    )
    line = [*line, "dataset.eval.count=null"]
    environment = train_command.environment(
        PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="node[1-2]", SLURM_GPUS_ON_NODE="1",
        LUTHIER_LAUNCH=str(ROOT / "launch" / "cpu_ddp.yaml"), LUTHIER_VENV=str(tmp_path),
        PYTHONPATH=str(ROOT / "src"),
    )  # fmt: skip

    def sbatch():
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "slurm.sh"), *line, f"output_dir={tmp_path / 'run'}"],
            env=environment, stdout=(tmp_path / "out.txt").open("a"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    job = sbatch()
    try:
        train_command.until((tmp_path / "run" / "metrics.jsonl").is_file, patience=100)
        # As SLURM does: the warning goes to every process of the step.
        (step,) = [p for p in psutil.Process(job.pid).children() if "srun" in " ".join(p.cmdline())]
        for process in step.children(recursive=True):
            process.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 0, train_command.said(tmp_path)[-3000:]
    finally:
        train_command.end(job)
    assert (tmp_path / "queue.txt").read_text() == f"requeued {os.getpid()}\n"
    stopped = train_command.record(tmp_path / "run")
    assert stopped["status"] == "stopped"
    assert 0 < stopped["sessions"][-1]["to_step"] < 150
    job = sbatch()
    try:
        assert job.wait(timeout=100) == 0, train_command.said(tmp_path)[-3000:]
    finally:
        train_command.end(job)
    assert (tmp_path / "queue.txt").read_text().count("requeued") == 1
    record = train_command.record(tmp_path / "run")
    assert record["status"] == "finished"
    assert record["launch"]["processes"] == 2
    codes, text = launch_ranks(forks, tiny, *line, "output_dir=unstopped")
    assert codes == [0, 0], text[-3000:]
    assert train_command.weights(tmp_path / "run") == train_command.weights(tiny / "unstopped")
