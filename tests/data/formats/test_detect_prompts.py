"""Prompts without a reply: read only where the config says that they are no more."""

import pytest

from luthier.config.schema import SourceConfig
from luthier.data.formats import find_shape
from luthier.data.rows import Row
from luthier.errors import UserError

USER = {"role": "user", "content": "2 + 2?"}


def shape(fields, **settings):
    rows = [Row(fields, "rows.jsonl:1")]
    return find_shape(SourceConfig(path="rows.jsonl", **settings), rows, "rows.jsonl"), rows[0]


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
    found, row = shape(fields, shape="prompt", **settings)
    assert (found.name, found.kind) == ("prompt", "conversation")
    assert found.read(row) == {"messages": messages}


def test_a_prompt_alone_is_no_shape_by_itself():
    with pytest.raises(UserError, match=r"prompts alone: dataset\.shape=prompt"):
        shape({"prompt": "2 + 2?", "solution": "4"})


def test_a_reply_beside_it_comes_first():
    assert shape({"prompt": "2 + 2?", "answer": "4"})[0].name == "prompt_completion"
