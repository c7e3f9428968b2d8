"""DeepSpeed ZeRO over two processes on CPUs, as its launch files say, against other launches."""

import signal
import subprocess
import sys

import psutil
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from end_to_end.test_resume_methods import line_of
from helpers import fsdp_cpu, train_command, zero_cpu
from helpers.train_command import end, metrics, record, said, until, weights, words

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not zero_cpu.IS_INSTALLED, reason="DeepSpeed is not installed"),
]

LORA = ("lora=default", "lora.r=4", "lora.lora_dropout=0.0")
CASES = {
    "full": ("trainer.args.activation_checkpointing=true", "trainer.evaluation.samples=2"),
    "lora": LORA,
    "packed": (*train_command.PACKED, "trainer.args.gradient_accumulation_steps=2"),
}


@pytest.fixture(scope="module")
def zero_forks():
    with zero_cpu.zero_forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def one_process(zero_forks, tiny):
    """A function that returns the folder of a case's run in one process with twice the batch."""
    folders = {}

    def train(case):
        if case not in folders:
            line = words(tiny, save_strategy="no", per_device_train_batch_size=4)
            code = zero_forks.run(tiny, *line, *CASES[case], f"output_dir=zero-one-{case}")
            assert code == 0, said(tiny)[-3000:]
            folders[case] = tiny / f"zero-one-{case}"
        return folders[case]

    return train


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(zero_forks, tiny, one_process, case, stage):
    name = f"zero{stage}-{case}"
    line = words(tiny, save_strategy="no")
    zero = zero_cpu.fork_zero(
        zero_forks, tiny, *line, *CASES[case], f"output_dir={name}", stage=stage
    )
    assert zero.code == 0, zero.text[-3000:]
    launch = record(zero.folder)["launch"]
    assert (launch["sharding"], launch["processes"]) == (f"zero{stage}", 2)
    one = one_process(case)
    saved, expected = (fsdp_cpu.saved_weights(run / "model") for run in (zero.folder, one))
    assert fsdp_cpu.largest_difference(saved, expected) < 5e-6
    two_losses, one_losses = (record(run)["results"]["eval_loss"] for run in (zero.folder, one))
    assert two_losses == pytest.approx(one_losses, abs=1e-5)
    for row, one_row in zip(metrics(zero.folder), metrics(one), strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "mean_token_accuracy", "num_tokens"):
            assert row.get(key) == pytest.approx(one_row.get(key), abs=1e-4), key
    if case == "full":
        answers = [(run / "replies.jsonl").read_text() for run in (zero.folder, one)]
        assert answers[0] == answers[1]
    if case == "lora":
        # Every tensor of the adapter is the trained one, as plain peft reads it.
        base = AutoModelForCausalLM.from_pretrained(tiny / "model")
        model = PeftModel.from_pretrained(base, zero.folder / "model")
        loaded = {n: p for n, p in model.named_parameters() if ".lora_" in n}
        assert len(loaded) == len(saved)
        for name, value in loaded.items():
            assert value.equal(saved[name.replace(".default", "")]), name
            assert value.abs().max() > 0, name


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [
        pytest.param(2, (), id="2-full", marks=pytest.mark.long),
        pytest.param(3, (), id="3-full", marks=pytest.mark.long),
        pytest.param(3, ("lora=default", "lora.r=4"), id="3-lora"),
    ],
)
def test_a_stopped_run_goes_on_exactly(zero_forks, tiny, stage, adapter):
    names = [f"zero{stage}-{'lora' if adapter else 'full'}-{part}" for part in ("whole", "stopped")]
    line = [*words(tiny), "trainer.args.gradient_accumulation_steps=2", *adapter]
    how = {"stage": stage}
    whole = zero_cpu.fork_zero(zero_forks, tiny, *line, f"output_dir={names[0]}", **how)
    assert whole.code == 0, whole.text[-3000:]
    # One rank alone gets the signal, within a step.
    signals = {1: [("transformers.trainer:Trainer.training_step", 9, signal.SIGTERM)]}
    line = [*line, f"output_dir={names[1]}"]
    stopped = zero_cpu.fork_zero(zero_forks, tiny, *line, **how, signals=signals)
    assert stopped.code == 75, stopped.text[-3000:]
    if stage == 2:
        other = zero_cpu.fork_zero(zero_forks, tiny, *line, **how, ranks=1)
        assert other.code == 2
        assert "the number of processes 2, and now with 1" in other.text
    resumed = zero_cpu.fork_zero(zero_forks, tiny, *line, **how)
    assert resumed.code == 0, resumed.text[-3000:]
    assert "resuming at step" in resumed.text
    assert weights(resumed.folder) == weights(whole.folder)
    rows = [
        # transformers counts operations by the slices that it sees.
        [{k: v for k, v in row.items() if k != "total_flos"} for row in metrics(run.folder)]
        for run in (whole, resumed)
    ]
    assert rows[0] == rows[1]
    if stage == 3 and not adapter:
        command = [sys.executable, "-m", "luthier", "merge", "--out", str(tiny / "merged")]
        command += [str(resumed.folder / "checkpoints" / "checkpoint-8")]
        environment = train_command.environment(**zero_cpu.VARIABLES)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        saved, expected = map(fsdp_cpu.saved_weights, (tiny / "merged", resumed.folder / "model"))
        assert fsdp_cpu.largest_difference(saved, expected) == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_the_launch_file_trains_in_bfloat16(zero_forks, tiny, one_process, stage):
    line = [*words(tiny, save_strategy="no", bf16="true"), *LORA, f"output_dir=zero{stage}-bf16"]
    zero = zero_cpu.fork_zero(zero_forks, tiny, *line, stage=stage, precision=None)
    assert zero.code == 0, zero.text[-3000:]
    assert record(zero.folder)["launch"]["precision"] == "bf16"
    losses = (record(run)["results"]["eval_loss"] for run in (zero.folder, one_process("lora")))
    assert next(losses) == pytest.approx(next(losses), abs=5e-3)


@pytest.mark.parametrize(
    ("stage", "words_of_recipe", "precision", "message"),
    [
        pytest.param(
            2, (), None,
            "Mixed precision bf16 was asked for (`ACCELERATE_MIXED_PRECISION=bf16` in the "
            "environment), but the recipe trains in float32",
            id="the-recipe-trains-in-float32",
        ),
        pytest.param(
            3, (*LORA, "quantization=nf4"), "no",
            "quantization: weights of 4 or 8 bits do not train under DeepSpeed ZeRO-3",
            id="quantized-in-slices",
        ),
        pytest.param(
            3, (*LORA, "model.add_tokens=[colour]"), "no",
            "model.add_tokens: single rows beside an adapter do not train under DeepSpeed ZeRO-3",
            id="new-tokens-beside-an-adapter",
        ),
    ],
)  # fmt: skip
def test_what_was_not_shown_is_refused(
    zero_forks, tiny, stage, words_of_recipe, precision, message
):
    line = [*words(tiny), *words_of_recipe, "output_dir=refused", "overwrite=true"]
    zero = zero_cpu.fork_zero(zero_forks, tiny, *line, stage=stage, precision=precision)
    assert zero.code == 2, zero.text[-3000:]
    assert message in zero.text
    assert "Instead:" in zero.text
    assert "Traceback" not in zero.text
    assert "Loading weights" not in zero.text


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_other_methods_train_as_copies_do(zero_forks, tiny, method):
    # DPO trains all weights, beside a reference model that is sliced, too.
    line = [w for w in line_of(tiny, method, "x") if not w.startswith("output_dir=")]
    line = [w for w in line if method != "dpo" or not w.startswith("lora")]
    port = zero_cpu.launch_environment(2)["MASTER_PORT"]
    pids = zero_forks.together(tiny, port, *line, f"output_dir=copies-{method}")
    assert [zero_forks.wait(pid, 120) for pid in pids] == [0, 0], said(tiny)[-3000:]
    zero = zero_cpu.fork_zero(zero_forks, tiny, *line, f"output_dir=zero-{method}", stage=3)
    assert zero.code == 0, zero.text[-3000:]
    saved = fsdp_cpu.saved_weights(zero.folder / "model")
    expected = fsdp_cpu.saved_weights(tiny / f"copies-{method}" / "model")
    assert fsdp_cpu.largest_difference(saved, expected) < 5e-6


def test_a_killed_rank_ends_the_run(tiny):
    line = [*words(tiny, max_steps=5000, save_steps=2), *LORA, "output_dir=zero-killed"]
    launcher = zero_cpu.start_zero(tiny, *line, stage=3)
    try:
        until((tiny / "zero-killed" / "checkpoints" / "checkpoint-2").is_dir, patience=150)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        victim = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
        victim.kill()
        assert launcher.wait(timeout=60) != 0
        assert not [rank for rank in ranks if rank.is_running()]
    finally:
        end(launcher)
    text = said(tiny)
    assert f"exitcode  : -9 (pid: {victim.pid})" in text
    assert "Root Cause" in text
