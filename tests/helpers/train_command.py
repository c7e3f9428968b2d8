"""What the tests of runs share: a model of two layers that trains in a second, and its command."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
TWO = (ACCELERATE, "launch", "-q", "--config_file", str(ROOT / "launch" / "cpu_ddp.yaml"))
ONE = (ACCELERATE, "launch", "-q", "--config_file", str(ROOT / "launch" / "cpu.yaml"))
SAYS = [("where is the key", "under the mat"), ("name a colour", "green"), ("two and two", "four")]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STEPS = 8


def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special, show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([" ".join(pair) for pair in SAYS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=special[2:], chat_template=TEMPLATE,
    )  # fmt: skip


def make(folder):
    """A random model with its tokenizer, and rows of different lengths."""
    tokens = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokens.save_pretrained(folder / "model")
    lines = [
        json.dumps({"prompt": f"{question} {n}", "completion": answer * (1 + n % 5)})
        for n in range(16)
        for question, answer in SAYS
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")


def words(folder, **also):
    """The command line of a run on them; `also` sets more of `trainer.args`."""
    args = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 3,
        "activation_checkpointing": "false", "learning_rate": 0.01, "disable_tqdm": "true",
        "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8,
        "save_strategy": "steps", "save_steps": 2, **also,
    }  # fmt: skip
    return [
        "model=hub", f"model.path={folder / 'model'}", "model.device=cpu", "model.dtype=float32",
        "dataset=jsonl", f"dataset.path={folder / 'rows.jsonl'}", "dataset.eval.count=8",
        f"dataset.cache={folder / 'cache'}", "chat.max_length=64", "trainer.evaluation.samples=0",
        "model.attention=sdpa", *(f"trainer.args.{key}={value}" for key, value in args.items()),
    ]  # fmt: skip


LORA = ("lora=default", "lora.r=4", "lora.lora_dropout=0.2")
WAY = ("trainer.args.gradient_accumulation_steps=2", *LORA)
PACKED = ("trainer.args.packing=true", "model.attention=auto")


def environment(**also):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | also


def start(folder, *words, launcher=(sys.executable,), **also):
    """Start a run; its output goes to files, so that no pipe fills up."""
    out = (folder / "out.txt").open("a")
    return subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *words], cwd=folder, env=environment(**also),
        stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(folder, *words, **how):
    """Run to the end; the exit code and all that was said."""
    process = start(folder, *words, **how)
    try:
        process.wait(timeout=120)
    finally:
        end(process)
    return process.returncode, said(folder)


def said(folder):
    return (folder / "out.txt").read_text()


def end(process):
    """Leave nothing behind of a launch."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(happens, patience=60):
    """Wait for something."""
    limit = time.monotonic() + patience
    while not happens():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.01)


def record(run):
    """What run.json holds, without its seal, so that it can be changed and written again."""
    return {k: v for k, v in json.loads((run / "run.json").read_text()).items() if k != "seal"}


def weights(run):
    """All saved tensors as bytes."""
    return {path.name: path.read_bytes() for path in sorted((run / "model").glob("*.safetensors"))}


TIMES = ("_runtime", "_per_second", "_time", "memory_gib")


def metrics(run):
    """The rows of metrics.jsonl without what is measured in seconds."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMES)} for line in lines]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_ranks(forks, folder, *words, ranks=2, per_rank=None, limit=60, **shared):
    """Run the ranks of one launch; their exit codes and what they said."""
    out = folder / "out.txt"
    began = out.stat().st_size if out.exists() else 0
    environment = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(ranks), **shared,
    }  # fmt: skip
    more = per_rank or (lambda rank: ((), {}))
    pids = []
    for rank in range(ranks):
        own_words, own = more(rank)
        variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | own
        pids.append(forks.start(folder, *words, *own_words, **variables))
    codes = [forks.wait(pid, limit) for pid in pids]
    return codes, out.read_bytes()[began:].decode()
