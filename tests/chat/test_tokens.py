"""Texts encoded together, and word by word, have the ids they have alone."""

import pytest
from tokenizers import normalizers

from helpers.conversations import CHATML, bot, pair, user
from luthier.chat import ChatEncoder

TEXTS = ["naïve cafe\u0301", "plain words, 123\n", "", "ﬁ ½ e\u0301", "\x00 control", "琵琶", " "]
FORMS = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "two forms": normalizers.Sequence([normalizers.NFD(), normalizers.NFC()]),
    "lower case": normalizers.Lowercase(),
}


def with_form(form):
    tokenizer = pair("gpt2-words", CHATML)
    if form is not None:
        tokenizer.backend_tokenizer.normalizer = form
    return tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_the_whole_text(form):
    tokenizer = with_form(FORMS[form])
    rows = [{"messages": [user(text + "?"), bot(text + "!")]} for text in TEXTS for _ in range(2)]
    for row, (sequence,) in zip(rows, ChatEncoder(tokenizer).encode_batch(rows).rows, strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert sequence.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
