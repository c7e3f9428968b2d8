"""Damages of a file by generation, and the folders of a run, a model and a sweep to damage.

The folders are as luthier writes them, of a handful of numbers and without torch.
"""

import json
import os
import struct
from dataclasses import asdict

import yaml

from helpers.chatml import CHATML
from luthier.record.checkpoints import publish_checkpoint
from luthier.record.record import hash_logs
from luthier.record.run_dir import WRITTEN_FILES
from luthier.storage.atomic import write_json
from luthier.storage.manifest import compute_seal
from luthier.storage.output_folder import MARKER
from luthier.storage.typed_files import MAX_BYTES

CHAT = {
    "template": CHATML, "train_on": "all", "boundaries": "served", "on_lost": "error",
    "max_length": 64, "on_long": "turns", "date": "2026-01-01", "variables": {},
    "eos_token_ids": [0],
}  # fmt: skip


def flip(path):
    """One bit of a byte in the middle, which is no ASCII any more."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_huge(path):
    """A file of more bytes than any of its sort, of which none is on the disk."""
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 2**20)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_link(path, target):
    path.unlink()
    path.symlink_to(target)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "a flipped bit": flip,
    "cut in the middle": cut,
    "empty": lambda path: path.write_bytes(b""),
    "blank": lambda path: path.write_bytes(b"\n \n"),
    "NUL bytes": lambda path: path.write_bytes(b"\0" * 300),
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}\n'),
    "lists in lists": lambda path: path.write_text("[" * 1500 + "]" * 1500 + "\n"),
    "mappings in mappings": lambda path: path.write_text('{"a": ' * 500 + "1" + "}" * 500 + "\n"),
    "a number": lambda path: path.write_text("5\n"),
    "a list of lists": lambda path: path.write_text("[[1], [2]]\n"),
    "an endless number": lambda path: path.write_text("1" * 10_000 + "\n"),
    "huge": make_huge,
    "a folder": replace_by_folder,
    "a pipe": replace_by_pipe,
    "a link to nothing": lambda path: replace_by_link(path, "nowhere"),
    "a link to itself": lambda path: replace_by_link(path, path.name),
}
"""What may become of a file, by words; each takes its path."""


def wrong_values(value):
    """Yield the dotted key and a copy of `value` for each entry that gets another JSON type."""
    for name, entry in value.items():
        wrong = ["wrong"] if isinstance(entry, dict) else {"type": ["wrong"]}
        yield name, value | {name: wrong}
        if isinstance(entry, dict):
            for below, changed in wrong_values(entry):
                yield f"{name}.{below}", value | {name: changed}


def write_safetensors(path, shapes):
    """Write float32 zeros of these shapes, by name."""
    head, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 4 * rows * columns
        head[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def make_base(folder):
    """A model of one weight; `index/` is the same one in shards."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9,
        "is_encoder_decoder": False,
    }  # fmt: skip
    name = "model.layers.0.self_attn.q_proj.weight"
    for place in (folder, folder / "index"):
        place.mkdir(parents=True)
        write_json(place / "config.json", config)
        write_json(place / "generation_config.json", {"eos_token_id": [0], "do_sample": False})
        write_json(place / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    write_safetensors(folder / "model.safetensors", {name: (4, 4)})
    shard = "model-00001-of-00001.safetensors"
    write_safetensors(folder / "index" / shard, {name: (4, 4)})
    index = {"metadata": {"total_size": 64}, "weight_map": {name: shard}}
    write_json(folder / "index" / "model.safetensors.index.json", index)


RESULTS = {"eval_loss": {"before": 2.0, "after": 1.0}}


def run_record(base):
    """What run.json holds of a finished run."""
    versions = {"python": "3.11.0", "luthier": "0.1.0", "torch": "2.13.0"}
    git = {"commit": "a" * 40, "branch": "main", "remote": None, "dirty": True,
           "changed_files": ["a.py"], "diff": "code/0.diff"}  # fmt: skip
    session = {"started": "2026-01-01T00:00:00+00:00", "host": "here", "status": "finished",
               "versions": versions, "from_step": 0, "seconds": 2.0}  # fmt: skip
    return {
        "format": 2, "status": "finished", "recipe": "tiny", "command": ["train.py"],
        "overrides": ["lora.r=2"], "cwd": "/", "seeds": {"seed": 1, "deterministic": False},
        "started": session["started"], "ended": session["started"], "versions": versions,
        "git": {"luthier": git, "here": git}, "seconds": 2.0, "training_seconds": 1.0,
        "hardware": {"system": "Linux", "cpu": "A", "cores": 2, "torch_threads": 1,
                     "memory_gib": 8.0, "gpus": [{"name": "G", "memory_gib": 80.0}]},
        "sessions": [session | {"status": "killed"}, session], "results": RESULTS,
        "peak_memory_gib": {"host": 1.0}, "tokenizer": {"sha256": "1" * 64},
        "model": {"path": str(base), "revision": None, "weights_sha256": "2" * 64, "files": []},
        "data": {"sha256": "3" * 64, "sources": {}, "train": {"rows": 4, "tokens": 40}},
        "launch": {"processes": 1, "sharding": "none", "precision": "no", "device": "cpu",
                   "launcher": None},
        "chat": CHAT, "trackers": {"wandb": {"id": "abc"}},
        "extended": [{"at_step": 1, "changes": ["trainer.args.max_steps: 1 -> 2"]}],
    }  # fmt: skip


def write_record(folder, entries):
    """Write run.json with the seal that luthier gives it."""
    write_json(folder / "run.json", {"seal": compute_seal(entries), **entries})


def run_config(base, folder):
    """A run's resolved config."""
    return {
        "model": {"path": str(base), "device": "cpu", "dtype": "float32"}, "lora": {"r": 2},
        "dataset": {"path": "rows.jsonl"}, "chat": {"max_length": 64}, "recipe": "tiny",
        "trainer": {"method": "sft", "args": {"max_steps": 2}, "evaluation": {}},
        "output_dir": str(folder), "seed": 42, "overwrite": False,
    }  # fmt: skip


def make_run(folder, base):
    """A finished run with an adapter and a checkpoint."""
    folder.mkdir(parents=True)
    config = run_config(base, folder)
    marker = {"kind": "run", "luthier": "1", "config_keys": list(config)}
    write_json(folder / MARKER, marker | {"written": asdict(WRITTEN_FILES)})
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = [{"step": step, "epoch": step / 2, "loss": 2.0 - step / 2} for step in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_record(folder, run_record(base) | {"logs": hash_logs(folder)})
    make_adapter(folder / "model", base)
    written = folder / "checkpoints" / ".new" / "checkpoint-2"
    write_safetensors(written / "adapter_model.safetensors", {"x": (2, 2)})
    publish_checkpoint(written, folder / "checkpoints" / "checkpoint-2", {"resumable": True})


def make_adapter(folder, base):
    """An adapter as a run saves it."""
    folder.mkdir(parents=True)
    config = {
        "base_model_name_or_path": str(base), "revision": None, "task_type": "CAUSAL_LM",
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": ["q_proj"],
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{layer}.lora_A.weight": (2, 4), f"{layer}.lora_B.weight": (4, 2)}
    write_safetensors(folder / "adapter_model.safetensors", shapes)
    write_json(folder / "chat.json", CHAT)


def make_sweep(folder):
    """A sweep of two trials, one of them killed while it ran."""
    definition = {
        "luthier": "0.1.0", "recipe": "tiny", "words": ["recipe=tiny", "lora.r=2,4"],
        "identity": {"params": {"lora.r": "2,4"}}, "objectives": {"eval_loss": "minimize"},
        "total": 2,
    }  # fmt: skip
    write_json(folder / "sweep.json", definition)
    trial = {"number": 0, "params": {"lora.r": "2"}, "state": "finished", "step": 2,
             "values": {"eval_loss": 1.0}, "seconds": 2.0, "attempts": 1, "error": None,
             "job": None}  # fmt: skip
    write_json(folder / "state" / "000.json", trial)
    killed = trial | {"number": 1, "params": {"lora.r": "4"}, "state": "running", "values": {}}
    write_json(folder / "state" / "001.json", killed)
    run = folder / "trials" / "001"
    run.mkdir(parents=True)
    write_record(run, {"format": 2, "status": "running", "versions": {"luthier": "0.1.0"}})
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "loss": 1.5}\n')
