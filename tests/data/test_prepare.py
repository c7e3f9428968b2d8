"""The whole way from files to token rows, with an encoder that is small enough to check by hand."""

import hashlib
import os
import struct
from pathlib import Path

import pytest

from luthier.chat.errors import ChatError
from luthier.chat.sequences import ChatBatch, ChatSequence
from luthier.config.schema import DatasetConfig
from luthier.data import Counts, prepare
from luthier.errors import UserError

ROWS = [{"prompt": "ab", "completion": letter} for letter in "cdef"]


class Letters:
    """An encoder: a letter is a token, replies train, and a reply of `-` is dropped."""

    def encode_batch(self, conversations):
        batch = ChatBatch()
        for conversation in conversations:
            number = len(batch.rows)
            prompt, reply = (message["content"] for message in conversation["messages"])
            if reply == "!":
                raise ChatError("no loud replies", reason="loud", row=number, message=1)
            ids = [ord(letter) for letter in prompt + reply]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            batch.rows.append([] if reply == "-" else [ChatSequence(ids, labels, [1], list)])
            if reply == "-":
                error = ChatError("nothing trains", reason="nothing to train", row=number)
                batch.dropped[error.reason] += 1
                batch.reports.append(error)
        return batch


def test_columns_counts_and_heldout(config, write):
    held = write("held.jsonl", [{"prompt": "xyz", "completion": "-"}, ROWS[3]])
    found = prepare(config([*ROWS, ROWS[0]], eval={"path": held}), Letters(), 0)
    assert found.train == {
        "input_ids": [[97, 98, 99], [97, 98, 100], [97, 98, 101], [97, 98, 99]],
        "labels": [[-100, -100, 99], [-100, -100, 100], [-100, -100, 101], [-100, -100, 99]],
    }
    assert found.eval == {"input_ids": [[97, 98, 102]], "labels": [[-100, -100, 102]]}
    assert [row["messages"][1]["content"] for row in found.heldout] == ["f"]
    assert found.reports == ["held.jsonl:1: nothing trains"]
    assert found.train_counts == Counts(4, 4, 12, 4, 3, {"equal to a held-out row": 1})
    assert found.eval_counts == Counts(2, 1, 3, 1, 3, {"nothing to train": 1})


def test_no_heldout_rows_where_none_are_asked_for(config):
    found = prepare(config(ROWS), Letters(), 0)
    assert found.eval == {"input_ids": [], "labels": []}
    assert (found.heldout, found.eval_counts) == ([], Counts())


def test_the_hash_changes_with_the_tokens_and_only_then(config):
    def digest(rows, seed=0, **settings):
        return prepare(config(rows, **settings), Letters(), seed).content_hash

    assert digest(ROWS) == digest(ROWS, seed=1)
    assert digest(ROWS) == digest([{**row, "id": 7} for row in ROWS])
    assert digest(ROWS, eval={"count": 1}) != digest(ROWS, eval={"count": 1}, seed=1)
    different = [
        digest(ROWS),
        digest(ROWS[::-1]),
        digest(ROWS[:3]),
        digest(ROWS, eval={"count": 1}),
    ]
    assert len(set(different)) == 4


def test_the_hash_stays_what_it_was(config):
    known = "406b627efc87119c727e8b61aeabc588ca433e115dc56b4c1de314648e4bb0c9"
    assert prepare(config(ROWS), Letters(), 0).content_hash == known


def test_the_hash_is_of_little_endian_int32_with_counts_before_rows(config):
    content = struct.pack("<q", 1) + struct.pack("<7i", 3, 97, 98, 99, -100, -100, 99)
    digest = hashlib.sha256(content + struct.pack("<q", 0)).hexdigest()
    assert prepare(config(ROWS[:1]), Letters(), 0).content_hash == digest


def test_a_row_that_the_encoder_refuses_is_named_by_its_place(config):
    rows = [ROWS[0], {"prompt": "a", "completion": "!"}, {"prompt": "a", "completion": "!"}]
    with pytest.raises(UserError, match=r"^data\.jsonl:2: message 1: no loud replies$"):
        prepare(config(rows), Letters(), 0)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], r"none of the 2 train rows gives anything to train on \(nothing to train: 2\)"),
        ([{"prompt": "a", "completion": "-"}], "none of the 2 train rows"),
    ],
    ids=["train", "train-with-heldout"],
)
def test_nothing_to_train_in_words(config, write, held, message):
    settings = {"eval": {"path": write("held.jsonl", held)}} if held else {}
    rows = [{"prompt": "x", "completion": "-"}, {"prompt": "y", "completion": "-"}]
    with pytest.raises(UserError, match=message) as error:
        prepare(config(rows, **settings), Letters(), 0)
    assert "The first one is data.jsonl:1." in str(error.value)


def test_a_heldout_side_without_tokens_is_an_error(config, write):
    held = write("held.jsonl", [{"prompt": "x", "completion": "-"}])
    with pytest.raises(UserError, match=r"none of the 1 eval rows .* held\.jsonl:1"):
        prepare(config(ROWS, eval={"path": held}), Letters(), 0)


ASSETS = os.environ.get("LUTHIER_ASSETS")
RECIPES = Path(__file__).parents[2] / "recipes" / "data"


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
def test_the_quickstarts_rows_train_on_their_replies(monkeypatch):
    from transformers import AutoTokenizer

    from luthier.chat.encoder import ChatEncoder

    monkeypatch.chdir(RECIPES)
    tokenizer = AutoTokenizer.from_pretrained(Path(ASSETS, "tokenizers", "smollm2"))
    settings = {"path": "reminders.train.jsonl", "eval": {"path": "reminders.heldout.jsonl"}}
    found = prepare(DatasetConfig.model_validate(settings), ChatEncoder(tokenizer), 0)
    assert (found.train_counts.sequences, found.eval_counts.sequences) == (1400, 120)
    assert max(found.train_counts.longest, found.eval_counts.longest) < 130
    for labels, conversation in zip(found.eval["labels"], found.heldout, strict=True):
        trained = [label for label in labels if label != -100]
        reply = conversation["messages"][-1]["content"]
        assert tokenizer.decode(trained) == f"{reply}<|im_end|>"
        assert len(trained) < 60
