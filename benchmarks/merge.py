"""What a merge costs and what it keeps.

    python benchmarks/merge.py memory            # peak memory, models of two sizes
    python benchmarks/merge.py logits RUN        # a run on nf4: logits after each kind of merge
    python benchmarks/merge.py answers RUN ROWS  # exact match with the adapter, and merged

`memory` merges LoRA of rank 16 into random models (Llamas, and mixtures of 64 experts), each in a
process of its own that notes its memory when everything is imported and planned, and the highest
while it writes. `logits` merges
the run's adapter onto its 4-bit weights and onto the original ones, and compares with the model
with its adapter on SmolLM2. `answers` asks both for the last message of each row (greedy).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

MB = 1e6


def memory(*sizes: int) -> None:
    """Peak memory of merges into models that differ in their number of layers."""
    print(
        f"{'kind':>10} {'layers':>6} {'model':>9} {'above the start':>16} {'of the model':>13} "
        f"{'time':>7}"
    )
    kinds = {"llama": sizes or (8, 32), "qwen3_moe": sizes or (4, 8), "gpt_oss": sizes or (4, 8)}
    for kind, layers in ((kind, layers) for kind, numbers in kinds.items() for layers in numbers):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, __file__, "one", str(layers), place, kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{kind:>10} {layers:>6} {found['model'] / MB:>6.0f} MB {found['peak'] / MB:>13.0f} MB "
            f"{found['peak'] / found['model']:>12.1%} {found['seconds']:>5.1f} s"
        )


def one(layers: int, place: str, kind: str) -> None:
    """One merge, measured from within."""
    from luthier.config.library_settings import QuantizationSettings
    from luthier.export import merge_streaming
    from luthier.export.model_layout import layout_of
    from luthier.model.artifact import find_artifact

    folder = Path(place)
    make(folder / "base", folder / "adapter", layers, kind)
    artifact = find_artifact(str(folder / "adapter"), str(folder / "base"))
    layout = layout_of(artifact, folder / "base")
    assert artifact.adapter is not None
    adapters = [(artifact.adapter, 1.0)]
    plan = merge_streaming.plan_merge(
        folder / "base", layout, adapters, QuantizationSettings(), None
    )
    (folder / "out").mkdir()
    # The adapter's file is mapped: its pages come into memory when they are first read.
    for change in (change for adapter in plan.adapters for change in adapter.changes.values()):
        assert change.a is not None and change.b is not None
        change.a.sum(), change.b.sum()
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident("VmRSS"), time.monotonic()
    for _ in plan.write(folder / "out"):
        pass
    found = {"model": plan.size, "peak": resident("VmHWM") - before}
    print(json.dumps(found | {"seconds": time.monotonic() - began}))


def make(base: Path, adapter: Path, layers: int, kind: str) -> None:
    """A random model in bfloat16, written tensor by tensor, and LoRA on its layers and experts."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from luthier.export.weight_files import TensorEntry, write_weights

    config = model_config(kind, layers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    files = dict(file_shapes(shapes) if kind == "qwen3_moe" else shapes)
    base.mkdir()
    planned = [TensorEntry(name, "BF16", shape) for name, shape in files.items()]
    for _ in write_weights(base, planned, lambda name: 0.02 * torch.randn(files[name])):
        pass
    config.save_pretrained(base)
    adapter.mkdir()
    pairs = {}
    for name, shape in shapes.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        rank, outputs, inputs = 16, shape[0], shape[-1]
        if name.endswith(("gate_up_proj", "down_proj")) and len(shape) == 3:
            module = key.rpartition(".")[0]
            key = module if name.endswith("down_proj") else f"{module}.base_layer"
            turned = kind == "gpt_oss"
            rank, outputs, inputs = (
                16 * shape[0],
                shape[2 if turned else 1],
                shape[1 if turned else 2],
            )
        elif not name.endswith("proj.weight"):
            continue
        pairs[f"{key}.lora_A.weight"] = 0.02 * torch.randn(rank, inputs)
        pairs[f"{key}.lora_B.weight"] = 0.02 * torch.randn(outputs, rank)
    save_file(pairs, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32}
    settings |= {"base_model_name_or_path": str(base), "target_modules": "all-linear"}
    if kind != "llama":
        settings["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def model_config(kind: str, layers: int) -> Any:
    """The configuration of a model: dense, of 64 experts, or of 64 in one tensor of the file."""
    import transformers

    sizes = {
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "dtype": "bfloat16",
    }
    if kind == "llama":
        return transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    experts = {"num_experts_per_tok": 4, "head_dim": 64}
    if kind == "gpt_oss":
        experts |= {"num_local_experts": 64, "intermediate_size": 512}
        return transformers.GptOssConfig(**sizes | experts, architectures=["GptOssForCausalLM"])
    experts |= {"num_experts": 64, "moe_intermediate_size": 512}
    return transformers.Qwen3MoeConfig(**sizes | experts, architectures=["Qwen3MoeForCausalLM"])


def file_shapes(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names of a Qwen3-MoE's files, which hold each expert by itself."""
    for name, shape in shapes.items():
        if len(shape) < 3:
            yield name, shape
            continue
        module, _, leaf = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for expert in range(shape[0]):
            for part in parts:
                yield f"{module}.{expert}.{part}.weight", (shape[1] // len(parts), shape[2])


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def logits(run: str) -> None:
    """The difference after each kind of merge, by the check of luthier merge itself."""
    from functools import partial

    from luthier.environment import quiet_libraries
    from luthier.export import merge_adapter
    from luthier.export.merge_in_memory import load_tuned
    from luthier.export.merge_in_memory import logits as of
    from luthier.model.artifact import find_artifact
    from luthier.model.tokenizer import load_tokenizer

    quiet_libraries()
    artifact = find_artifact(run)
    prompts = merge_adapter.prompts_of(artifact, load_tokenizer(artifact.base))
    print(f"{'onto':>9} {'dtype':>9} {'largest':>9} {'std':>9} {'same token':>11}")
    for onto in ("trained", "original"):
        order = merge_adapter.MergeOrder([artifact], [1.0], Path(), onto=onto)
        wanted = of(partial(load_tuned, artifact, order.adapters, order.packs)(), prompts)
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as place:
                target = Path(place) / "merged"
                merge_adapter.merge_adapters(
                    replace(order, target=target, dtype=dtype, verify=False), str
                )
                found = merge_adapter.compare_logits(
                    wanted, of(merge_adapter.load_folder(target, artifact.task), prompts)
                )
            print(
                f"{onto:>9} {dtype:>9} {found.largest:>9.2g} {found.relative:>9.2g} "
                f"{found.agreeing:>10.1%}"
            )


def answers(run: str, rows: str, dtype: str, batch: int = 24) -> None:
    """Replies to held-out conversations, with the adapter and merged, scored by exact match."""
    from luthier.environment import quiet_libraries
    from luthier.export import merge_adapter
    from luthier.export.merge_in_memory import load_tuned
    from luthier.infer.generate import generate
    from luthier.model.artifact import build_chat_encoder, find_artifact
    from luthier.model.tokenizer import load_tokenizer
    from luthier.record.checkpoints import read_step_log

    quiet_libraries()
    artifact, talks = find_artifact(run), read_step_log(Path(rows))
    tokenizer: Any = load_tokenizer(artifact.base)
    encoder = build_chat_encoder(artifact, tokenizer)
    prompts = [encoder.prompt(talk["messages"][:-1]) for talk in talks]
    order = merge_adapter.MergeOrder([artifact], [1.0], Path(), dtype, verify=False)

    def replies(model: Any) -> list[str]:
        stops, pad = encoder.stop_token_ids, tokenizer.pad_token_id
        limits = {"max_new_tokens": 64, "batch_size": batch}
        ids = generate(model, prompts, stop_ids=stops, pad_id=pad, **limits)
        return [tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]

    before = replies(load_tuned(artifact, order.adapters, order.packs))
    with tempfile.TemporaryDirectory() as place:
        merge_adapter.merge_adapters(replace(order, target=Path(place) / "merged"), str)
        after = replies(merge_adapter.load_folder(Path(place) / "merged", artifact.task))
    wanted = [talk["messages"][-1]["content"].strip() for talk in talks]
    right = [
        sum(a == b for a, b in zip(texts, wanted, strict=True)) / len(wanted)
        for texts in (before, after)
    ]
    same = sum(a == b for a, b in zip(before, after, strict=True))
    print(
        f"{len(talks)} rows, merged in {dtype}: exact match {right[0]:.1%} with the adapter, "
        f"{right[1]:.1%} merged; {same} replies are the same"
    )


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["memory", "logits", "answers", "one"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    if given.what == "memory":
        memory(*map(int, given.words))
    elif given.what == "one":
        one(int(given.words[0]), *given.words[1:])
    elif given.what == "logits":
        logits(given.words[0])
    else:
        answers(given.words[0], given.words[1], given.dtype)


if __name__ == "__main__":
    main()
