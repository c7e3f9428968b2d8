"""Checkpoints under FSDP2, whole and in shards: two processes as `launch/fsdp2.yaml` has them."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from helpers import fsdp_cpu
from helpers.chatml import jsonl
from helpers.fsdp_cpu import SHARDED, fork_fsdp, largest_difference, saved_weights
from helpers.model_families import save_family
from helpers.train_command import (
    LORA,
    PACKED,
    metrics,
    record,
    said,
    until,
    weights,
    words,
)
from luthier.cli import merge
from luthier.errors import UserError
from luthier.model.artifact import find_artifact

pytestmark = pytest.mark.train

STEP = "luthier.train.methods.sft:TokenTrainer.training_step"
FULL = PACKED
WAYS = {
    "full weights": (FULL, ()),
    "full weights in shards": (FULL, SHARDED),
    "an adapter": (LORA, ()),
    "an adapter in shards": (LORA, SHARDED),
}
BEST = (
    "trainer.args.load_best_model_at_end=true", "trainer.args.metric_for_best_model=eval_loss",
    "trainer.args.gradient_accumulation_steps=2", "trainer.args.save_total_limit=2",
)  # fmt: skip


def command(tiny, extra, output, **args):
    args = {"max_steps": 4, "save_steps": 1, "eval_steps": 1, "logging_steps": 1, **args}
    return [*words(tiny, **args), *extra, *BEST, f"output_dir={output}"]


def plain_names(trained):
    """The weights on the ranks by the names of their files: those of an adapter alone, if any."""
    adapter = {
        name.replace(".default", ""): value for name, value in trained.items() if "lora_" in name
    }
    return adapter or trained


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_stopped_ends_as_one_that_was_not(forks, tiny, way):
    extra, flags = WAYS[way]
    name = way.replace(" ", "-")
    whole = fork_fsdp(forks, tiny, *command(tiny, extra, name), flags=flags)
    assert whole.code == 0, whole.text[-3000:]
    best = json.loads((whole.folder / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    assert 0 < best["best_global_step"] <= 4
    at_best = plain_names(whole.gathered_weights(f"step-{best['best_global_step']}"))
    assert largest_difference(saved_weights(whole.folder / "model"), at_best) == 0
    if extra == LORA:
        checkpoint = saved_weights(whole.folder / "checkpoints/checkpoint-4")
        assert largest_difference(checkpoint, plain_names(whole.gathered_weights("step-4"))) == 0
        assert largest_difference(loaded_by_peft(tiny / "model", whole.folder), at_best) == 0

    # In the middle of accumulation, all ranks or one of them.
    line = command(tiny, extra, f"{name}-stopped")
    signals = {0: [(STEP, 3, signal.SIGUSR1)], 1: [(STEP, 3, signal.SIGUSR1)]}
    stopped = fork_fsdp(forks, tiny, *line, flags=flags, signals=signals)
    assert stopped.code == 75, stopped.text[-3000:]
    assert record(stopped.folder)["sessions"][-1]["to_step"] == 2
    refuse_other_launches(forks, tiny, line)
    # The kind of checkpoint may change in between.
    other = () if flags else SHARDED
    signals = {1: [(STEP, 3, signal.SIGTERM)]}
    assert fork_fsdp(forks, tiny, *line, flags=other, signals=signals).code == 75
    resumed = fork_fsdp(forks, tiny, *line, flags=flags)
    assert resumed.code == 0, resumed.text[-3000:]
    assert "resuming at step" in resumed.text
    assert weights(resumed.folder) == weights(whole.folder)
    assert metrics(resumed.folder) == metrics(whole.folder)
    final = resumed.gathered_weights(), whole.gathered_weights()
    assert largest_difference(*final) == 0
    assert len(record(resumed.folder)["sessions"]) == 3


def loaded_by_peft(base, run):
    """What plain peft puts on the plain base of a run's adapter."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    return get_peft_model_state_dict(PeftModel.from_pretrained(model, str(run / "model")))


def refuse_other_launches(forks, tiny, line):
    """One process, and two without sharding, are told before a model is loaded."""
    began = len(said(tiny))
    assert forks.run(tiny, *line) == 2
    text = said(tiny)[began:]
    assert "was launched with the number of processes 2, and now with 1" in text
    assert "Loading" not in text and "tokens" not in text
    pids = forks.together(tiny, fsdp_cpu.launch_environment()["MASTER_PORT"], *line)
    codes = [forks.wait(pids[0], limit=60)]
    os.kill(pids[1], signal.SIGKILL)
    forks.wait(pids[1])
    assert codes == [2]
    assert "was launched with the sharding fsdp2, and now with ddp" in said(tiny)[began:]


@pytest.mark.parametrize("way", ["full weights in shards", "an adapter"])
def test_what_is_not_as_it_was_written_stops_the_run_and_removes_nothing(forks, tiny, way):
    extra, flags = WAYS[way]
    line = command(tiny, extra, f"damaged-{len(flags)}", max_steps=3, save_total_limit=1)
    line = [word for word in line if "load_best" not in word]
    kind = "shards" if extra == FULL else "file"
    run = fork_fsdp(forks, tiny, *line, flags=flags, FSDP_DAMAGE=f"{kind}:2")
    assert run.code == 2, run.text[-3000:]
    assert "what was saved is not what the processes trained" in run.text
    assert "Traceback" not in run.text
    kept = [path.name for path in (run.folder / "checkpoints").glob("checkpoint-*")]
    assert kept == ["checkpoint-1"]
    again = fork_fsdp(forks, tiny, *line, flags=flags)
    assert again.code == 0, again.text[-3000:]
    assert "resuming at step" in again.text


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3"])
def test_shards_become_a_model_with_the_names_of_its_files(forks, tmp_path, family):
    """A mixture whose files have a tensor for each expert, and a model within a wrapper."""
    base = save_family(tmp_path / "base", family)
    jsonl(
        tmp_path / "rows.jsonl",
        [{"prompt": f"name {n}", "completion": f"green {n % 3}"} for n in range(12)],
    )
    line = [
        "model=hub", f"model.path={base}", "model.device=cpu", "model.dtype=float32",
        "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.eval.count=4",
        f"dataset.cache={tmp_path}/cache", "chat.max_length=64", "trainer.evaluation.samples=0",
        "trainer.args.per_device_train_batch_size=1", "trainer.args.disable_tqdm=true",
        "trainer.args.learning_rate=0.01", "trainer.args.activation_checkpointing=false",
        "trainer.args.save_strategy=steps", "trainer.args.save_steps=1",
        "trainer.args.max_steps=2",
    ]  # fmt: skip
    run = fork_fsdp(forks, tmp_path, *line, "output_dir=shards", flags=SHARDED)
    assert run.code == 0, run.text[-3000:]
    saved = saved_weights(run.folder / "model")
    assert saved.keys() == saved_weights(base).keys()
    checkpoint = run.folder / "checkpoints" / "checkpoint-2"
    assert not list(checkpoint.glob("*.safetensors"))
    with pytest.raises(UserError, match=f"luthier merge {checkpoint}"):
        find_artifact(str(checkpoint))
    # The run itself is evaluated, pushed and talked to as any other.
    assert find_artifact(str(run.folder)).base.path == str(run.folder / "model")
    assert merge.run([str(checkpoint)]) == 0
    merged = checkpoint.with_name("checkpoint-2-merged")
    assert largest_difference(saved_weights(merged), saved) == 0
    files = {path.name for path in (run.folder / "model").iterdir()}
    assert files - {path.name for path in merged.iterdir()} == set()
    compare_logits(run.folder / "model", merged)
    adapted = fork_fsdp(forks, tmp_path, *line, *LORA, "output_dir=adapter", flags=SHARDED)
    assert adapted.code == 0, adapted.text[-3000:]
    trained, adapter = plain_names(adapted.gathered_weights()), adapted.folder / "model"
    assert any("experts" in name for name in trained) == (family == "qwen3_moe")
    assert largest_difference(saved_weights(adapter), trained) == 0
    # Whole weights under the hub's names are handed out to the ranks again.
    whole = fork_fsdp(forks, tmp_path, *line, "output_dir=whole")
    assert whole.code == 0, whole.text[-3000:]
    before = weights(whole.folder)
    assert before == weights(run.folder)
    for path in (whole.folder / "model", whole.folder / "checkpoints" / "checkpoint-2"):
        shutil.rmtree(path)
    content = record(whole.folder) | {"status": "stopped"}
    (whole.folder / "run.json").write_text(json.dumps(content))
    again = fork_fsdp(forks, tmp_path, *line, "output_dir=whole")
    assert "resuming at step" in again.text, again.text[-3000:]
    assert weights(whole.folder) == before


def compare_logits(folder, other):
    """Plain transformers loads both, without a word about names, with equal logits."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    logits = []
    for path in (folder, other):
        (architecture,) = AutoConfig.from_pretrained(path).architectures
        model, loading = getattr(transformers, architecture).from_pretrained(
            path, dtype="float32", output_loading_info=True
        )
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        AutoTokenizer.from_pretrained(path)
        with torch.no_grad():
            logits.append(model.eval()(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits)
    assert torch.equal(*logits)


def test_the_error_of_one_rank_comes_first_and_the_others_say_why_they_stop(forks, tiny):
    line = command(tiny, LORA, "raises", save_strategy="no", eval_strategy="no")
    line = [word for word in line if "best" not in word]
    run = fork_fsdp(forks, tiny, *line, FSDP_RAISE="1")
    assert run.code in (1, 2)
    own, other = "rank 1 alone found what is wrong", "rank 0: another process of this run has ended"
    assert run.text.index(own) < run.text.index(other)
    assert "Traceback" not in run.text
    assert "another process" in record(run.folder)["error"]


def test_a_killed_rank_ends_the_run_and_leaves_no_process(tiny, tmp_path):
    args = {"max_steps": 4000, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
    line = [*words(tiny, **args), f"output_dir={tmp_path / 'killed'}"]
    process = fsdp_cpu.start_fsdp(tmp_path, *line)
    try:
        until(lambda: (tmp_path / "killed" / "metrics.jsonl").is_file(), patience=120)
        ranks = children(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        code = process.wait(timeout=60)
    finally:
        fsdp_cpu._kill_group(process)
    text = (tmp_path / "out.txt").read_text()
    assert code != 0
    assert time.monotonic() - began < 60
    assert "rank 0: another process of this run has ended" in text
    assert "Signal 9 (SIGKILL)" in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert record(tmp_path / "killed")["status"] == "failed"


def children(pid):
    """The processes below one, in the order in which they were started."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]
