"""Encoders that are small enough to check by hand, and the ways to prepare and to read rows."""

import json
from types import SimpleNamespace

import pyarrow as pa
from tokenizers import Tokenizer, models

from luthier.chat import ChatError
from luthier.config.schema import DatasetConfig
from luthier.data.encoders.chat import EncodedRows, row_outcome
from luthier.data.prepare import prepare

NAMELESS = SimpleNamespace(
    backend_tokenizer=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")),
    special_tokens_map={},
    split_special_tokens=False,
)
"""What a cache key needs of a tokenizer; `Letters` asks it for nothing."""


class Letters:
    """A letter is a token, and the last message trains, or a whole text.

    What it does with a row stands at the beginning of what trains: `-` gives nothing, `!` is
    refused, `?` is kept though not whole, `<` loses a turn, and `a|b` are two sequences.
    """

    def __init__(self, version=1):
        self.version = version

    def settings(self):
        return {"letters": self.version}

    def encode(self, examples):
        made = EncodedRows({"input_ids": [], "labels": [], "trained": []}, [])
        lossy = ("lost field", "message 0, field `name`: it is not shown")
        for number, example in enumerate(examples):
            *before, reply = texts(example)
            parts = [] if reply.startswith("-") else reply.split("|")
            if reply.startswith("!"):
                raise ChatError("no loud replies", reason="loud", row=number, message=1)
            for part in parts:
                prompt, answer = ([ord(c) for c in text] for text in ("".join(before), part))
                made.columns["input_ids"].append(prompt + answer)
                made.columns["labels"].append([-100] * len(prompt) + answer)
                made.columns["trained"].append(len(answer))
            problem = lossy if reply.startswith("?") else None
            if not parts:
                problem = ("nothing to train", "no turn of the row trains")
            cut_turns = 1 if reply.startswith("<") else None
            made.outcomes.append(row_outcome(len(parts), problem, cut_turns))
        return made


def texts(example):
    """The texts of a conversation's messages, or the one of a document."""
    if "text" in example:
        return [example["text"]]
    return [message["content"] for message in example["messages"]]


def prepared(settings, seed=0, encoder=None, tokenizer=NAMELESS):
    """What a dataset's settings give."""
    used = encoder or Letters()
    config = DatasetConfig.model_validate(settings)
    return prepare(config, lambda kind, source, key: used, tokenizer, seed)


def shown(rows):
    """Each sequence of an epoch as `prompt>reply`."""
    found = []
    for number in rows.index.tolist():
        row = rows.table.row(number)
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        start = labels.count(-100)
        assert labels == [-100] * start + ids[start:]
        assert row["trained"] == len(ids) - start
        found.append(f"{text(ids[:start])}>{text(ids[start:])}")
    return found


def text(ids):
    return "".join(map(chr, ids))


def pair(prompt, reply, **more):
    """A row with a prompt and a reply."""
    return {"prompt": prompt, "completion": reply, **more}


def replies(*names):
    """Rows that ask the same and answer so."""
    return [pair("q", name) for name in names]


def save(folder, **splits):
    """Leave rows in a folder as `DatasetDict.save_to_disk` does."""
    for split, rows in splits.items():
        (folder / split).mkdir(parents=True)
        table = pa.Table.from_pylist(rows)
        file = str(folder / split / "data-00000-of-00001.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        facts = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(facts))
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*splits]}))
