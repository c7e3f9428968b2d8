"""benchmarks/gpu.py: what it counts, what it leaves out, and one real cell on a CPU."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import gpu
from gpu import Cell, Result, count_batch, measure_cells, print_results, random_documents
from offline_folder import RUN, SCRIPTS, split_dependencies

SCRIPT = Path(gpu.__file__)


def tensors(**columns):
    import torch

    return {name: torch.tensor(values) for name, values in columns.items()}


BATCHES = {
    # Documents of 3 and 2 tokens: 3 x 4 / 2 + 2 x 3 / 2 pairs.
    "padded": {
        "labels": [[-100, 5, 6], [-100, 5, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    },
    "packed with padding": {
        "labels": [[-100, 5, 6, -100, 5, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
        "tokens": [5],
    },
    "flat as TRL packs": {
        "labels": [[-100, 5, 6, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
    },
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_batch_counts_tokens_trained_ones_and_pairs(batch):
    counts = count_batch(tensors(**batch))
    assert [int(count) for count in counts] == [5, 3, 9]


def test_documents_are_the_same_in_each_process_and_fit_a_row():
    rows, again = random_documents(128, 512), random_documents(128, 512)
    assert rows == again
    assert {len(ids) for ids in rows["input_ids"]} <= set(range(16, 129))
    assert all(map(len, rows["labels"]))
    assert [len(a) for a in rows["labels"]] == [len(a) for a in rows["input_ids"]]


def test_cells_without_time_are_named(capsys):
    cells = [Cell("llama_8b", "LoRA", "luthier"), Cell("qwen_1_7b", "full", "TRL")]
    results = measure_cells(cells, Namespace(minutes=0.0, seconds=12.0, device="cuda"))
    print_results(results)
    assert capsys.readouterr().out.splitlines() == [
        "not measured: llama_8b LoRA, luthier: no time left",
        "not measured: qwen_1_7b full, TRL: no time left",
    ]


def measured(way, tokens):
    values = {
        "device": "NVIDIA H200", "seconds": 2.0, "tokens": tokens, "trained": tokens // 2,
        "flops": 989e12, "memory": 40 * 2**30, "plan": 42 * 2**30, "what": "2 packed rows, kept",
    }  # fmt: skip
    return Result(Cell("llama_8b", "LoRA", way), values)


def test_the_table_has_ratio_share_and_aim(capsys):
    print_results([measured("luthier", 20_000), measured("TRL", 8_000)])
    text = capsys.readouterr().out
    assert "10,000     10,000" not in text
    assert "    10,000      5,000    50.0%   40.00   42.00  2 packed rows, kept" in text
    assert "llama_8b LoRA: luthier / TRL: 2.50" in text
    assert "llama_8b LoRA: 80% of the aim of 12,500.0 tokens/s" in text


def test_a_folder_for_offline_machines_leaves_compiled_code_to_them():
    pure, compiled = split_dependencies("luthier")
    assert {"transformers", "trl", "peft", "accelerate", "datasets", "simpleeval"} <= set(pure)
    assert {"torch", "bitsandbytes", "tokenizers", "safetensors", "pydantic"} <= set(compiled)
    assert not {"nvidia-cublas", "triton", "sympy"} & (set(pure) | set(compiled))
    assert all((SCRIPT.parent / script).exists() for script in SCRIPTS)


def test_the_script_of_the_folder_is_valid_bash():
    text = RUN.format(expected="#   torch 2.13.0")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.train
def test_a_cell_trains_in_its_own_process(tmp_path):
    file = tmp_path / "gpu.json"
    words = ["--shape", "tiny", "--device", "cpu", "--only", "LoRA, luthier", "--seconds", "0.1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--json", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(file.read_text())["results"]
    assert result["problem"] == ""
    assert result["steps"] >= gpu.FEWEST
    assert result["tokens"] > result["trained"] > result["tokens"] // 2
    # On a CPU it is the process that is measured, and libraries that are loaded late take more than
    # this model.
    assert 0.3 * result["plan"] < result["memory"] < 3 * result["plan"] + 2**26
