"""Conversations of a dataset as token rows, each with its own variables for the template."""

import json

import pytest

from helpers.chatml import CHAT, CHATML, byte_tokenizer, jsonl
from luthier.chat import ChatError
from luthier.config.schema import DatasetConfig
from luthier.data.encoders.chat import ConversationEncoder
from luthier.data.prepare import prepare
from luthier.errors import UserError

MOODY = "{{ mood }}" + CHATML
TOKENIZER = byte_tokenizer()
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
KWARGS = [{"mood": "m"}, None, {"mood": "n"}, {"mood": "m"}]
ROWS = [{"messages": TALK, "chat_template_kwargs": kwargs} for kwargs in KWARGS]
TOLD = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """Two sources, one of them a table that holds the mappings as text."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", ROWS)
    quoted = json.dumps({"mood": "o"}).replace('"', '""')
    (tmp_path / "b.csv").write_text(
        f'prompt,completion,chat_template_kwargs\nHi,Yo,"{quoted}"\nHi,Yo,\n'
    )


def prepared(**settings):
    dataset = {
        "sources": {"a": {"path": "a.jsonl"}, "b": {"path": "b.csv"}},
        "mix": "concatenate", "cache": "cache", "deduplicate": "exact",
    }  # fmt: skip
    encoder = ConversationEncoder(TOKENIZER, CHAT | {"template": MOODY} | settings)
    return prepare(DatasetConfig(**dataset), lambda *_: encoder, TOKENIZER, 0)


def texts(found):
    rows = (found.train.table.row(number)["input_ids"] for number in found.train.different)
    return sorted(TOKENIZER.decode(ids.tolist()) for ids in rows)


def test_rows_of_a_mixture_are_rendered_and_cached_with_their_own():
    found = prepared()
    # Of equal rows one stays: those with other variables are not equal.
    assert texts(found) == sorted(mood + TOLD for mood in ("m", "n", "o", ""))
    keys = [source.stored.folder for source in found.sources.values()]
    again = prepared()
    assert [source.stored.folder for source in again.sources.values()] == keys
    assert texts(again) == texts(found)


def test_a_variable_that_the_template_never_reads_names_its_row():
    with pytest.raises(UserError) as error:
        prepared(template=CHATML)
    words = "a.jsonl:1: field `chat_template_kwargs`: 'mood' is set, and the chat template never"
    assert str(error.value).startswith(words)
    with pytest.raises(ChatError, match=r"^chat\.variables: 'mood' is set, and the chat template"):
        prepared(template=CHATML, variables={"mood": "m"})


def test_what_is_read_back_from_the_store_renders_as_it_did(tmp_path):
    """Templates write tools and arguments in the order of their keys."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}]
    jsonl(tmp_path / "a.jsonl", [{"messages": TALK, "tools": tools}])
    template = "{{ tools | tojson }}" + MOODY
    found = prepared(template=template)
    source = found.sources["dataset.sources.a"]
    (example,) = source.examples([0])
    chat = ConversationEncoder(TOKENIZER, CHAT | {"template": template}).chat
    (sequence,) = chat.encode(**example)
    assert sequence.input_ids == source.tokens.row(0)["input_ids"].tolist()
    assert json.dumps(example["tools"]) == json.dumps(tools)
