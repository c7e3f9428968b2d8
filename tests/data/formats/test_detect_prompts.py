"""Prompts without a reply: read only where the config says that they are no more."""

import pytest

from luthier.config.schema import SourceConfig
from luthier.data.formats import detect_format
from luthier.data.rows import Row
from luthier.errors import UserError

USER = {"role": "user", "content": "2 + 2?"}


def detect(fields, **settings):
    rows = [Row(fields, "rows.jsonl:1")]
    return detect_format(SourceConfig(path="rows.jsonl", **settings), rows, "rows.jsonl"), rows[0]


@pytest.mark.parametrize(
    ("fields", "settings", "messages"),
    [
        ({"prompt": "2 + 2?", "solution": "4"}, {}, [USER]),
        ({"prompt": [USER], "solution": "4"}, {}, [USER]),
        ({"problem": "2 + 2?"}, {"columns": {"prompt": "problem"}}, [USER]),
        ({"question": "2 + 2?"}, {"system": "Add."}, [{"role": "system", "content": "Add."}, USER]),
    ],
    ids=["a text", "messages", "a column of another name", "a system prompt"],
)
def test_prompts(fields, settings, messages):
    row_format, row = detect(fields, type="prompt", **settings)
    assert (row_format.type, row_format.example_type) == ("prompt", "conversation")
    assert row_format.read(row) == {"messages": messages}


def test_a_prompt_alone_is_no_format_by_itself():
    with pytest.raises(UserError, match=r"prompts without replies: dataset\.type=prompt"):
        detect({"prompt": "2 + 2?", "solution": "4"})


def test_a_reply_beside_it_comes_first():
    assert detect({"prompt": "2 + 2?", "answer": "4"})[0].type == "prompt_completion"
