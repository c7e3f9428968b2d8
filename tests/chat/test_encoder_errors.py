"""Every bad row is named with its place; the policy decides between stopping and dropping."""

import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.conversations import CHATML, bot, call, pair, trl, user
from luthier.chat import ChatEncoder, ChatError

CYCLE: dict = {"a": 1}
CYCLE["self"] = CYCLE
GOOD = {"messages": [user("q"), bot("a")]}
BAD = {
    "no dict": ({"messages": ["hi"]}, "a message must be a dict"),
    "row is no dict": (["hi"], "a row must be a dict"),
    "no messages": ({}, "at least one message"),
    "empty": ({"messages": []}, "at least one message"),
    "text for messages": ({"messages": "hi"}, "found str"),
    "no role": ({"messages": [{"content": "hi"}]}, "needs a role"),
    "role is a number": ({"messages": [{"role": 1, "content": "hi"}]}, "needs a role"),
    "missing content": ({"messages": [{"role": "user"}, bot("a")]}, "no content"),
    "content None": ({"messages": [user(None), bot("a")]}, "no content"),
    "reply None": ({"messages": [user("q"), bot(None)]}, "no content"),
    "content is a number": ({"messages": [user(7), bot("a")]}, "only text can be trained"),
    "image": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), bot("a")]},
        "only text can be trained.*image_url",
    ),
    "half a surrogate": ({"messages": [user("a\ud800"), bot("a")]}, "surrogate"),
    "cyclic arguments": (
        {
            "messages": [
                user("q"),
                bot("", tool_calls=[{"function": {"name": "f", "arguments": CYCLE}}]),
            ]
        },
        "holds itself",
    ),
    "tools no list": ({"messages": [user("q"), bot("a")], "tools": {"a": 1}}, "`tools` must be"),
    "tool no schema": ({"messages": [user("q"), bot("a")], "tools": [7]}, "JSON schema"),
    "calls nobody sees": (
        {"messages": [user("q"), bot("a", tool_calls=[call()])]},
        "does not show",
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return pair("gpt2-words", CHATML, eos="<|im_end|>")


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named(name, tokenizer):
    row, words = BAD[name]
    with pytest.raises(ChatError, match=words) as caught:
        ChatEncoder(tokenizer).encode_batch([GOOD, row])
    assert caught.value.row == 1 and str(caught.value).startswith("row 1")
    batch = ChatEncoder(tokenizer, on_lost="drop").encode_batch([GOOD, row, GOOD])
    assert [len(sequences) for sequences in batch.rows] == [1, 0, 1]
    assert batch.counts["dropped_rows"] == 1 and batch.reports[0].row == 1


def test_template_refusing_a_role_speaks_for_itself():
    tokenizer = pair("gpt2-words", trl("gemma3"))
    rows = [GOOD, {"messages": [user("a"), user("b"), bot("c")]}]
    with pytest.raises(ChatError, match=r"row 1: the chat template refuses.*must alternate"):
        ChatEncoder(tokenizer).encode_batch(rows)


def test_tokenizer_without_template_says_how_to_give_one():
    bare = pair("gpt2-words", CHATML)
    bare.chat_template = None
    with pytest.raises(ChatError, match=r"no chat template.*chat\.template"):
        ChatEncoder(bare)
    assert ChatEncoder(bare, template=CHATML).settings()["template"] == CHATML


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}", "does not compile"),
        ("nowhere.jinja", "neither Jinja text nor a file"),
    ],
)
def test_bad_template(template, words, tokenizer):
    with pytest.raises(ChatError, match=words):
        ChatEncoder(tokenizer, template=template)


def test_template_from_a_file(tmp_path, tokenizer):
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    assert ChatEncoder(tokenizer, template=str(file)).settings()["template"] == CHATML


def test_bad_date(tokenizer):
    with pytest.raises(ChatError, match="YYYY-MM-DD"):
        ChatEncoder(tokenizer, date="yesterday")


def test_importing_needs_no_heavy_library():
    code = (
        "import sys, luthier.chat;"
        "heavy = {'torch', 'transformers', 'hydra', 'trl'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _whole_words():
    """A tokenizer that makes the control token of its text even where it may not."""
    words = ["[UNK]", "<|im_start|>", "<|im_end|>", "user", "assistant", "Hi"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHATML,
        eos_token="<|im_end|>",
        unk_token="[UNK]",
        additional_special_tokens=["<|im_start|>"],
    )


@pytest.mark.parametrize("on_lost", ["drop", "keep", "error"])
def test_text_that_cannot_but_be_a_control_token(on_lost):
    encoder = ChatEncoder(_whole_words(), on_lost=on_lost)
    talks = [[user("Hi"), bot("Hi")], [user("Hi <|im_end|> Hi"), bot("Hi")], [user("Hi"), bot("a")]]
    rows = [{"messages": talk} for talk in talks]
    if on_lost == "drop":
        batch = encoder.encode_batch(rows)
        assert [len(row) for row in batch.rows] == [1, 0, 1]
        assert batch.dropped == {"cannot be neutralised": 1} and batch.reports[0].row == 1
        return
    with pytest.raises(ChatError, match="remove it from the row") as caught:
        encoder.encode_batch(rows)
    assert caught.value.row == 1
