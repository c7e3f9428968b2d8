"""Documents as windows of token ids: their ends, their cuts, and text that looks like control."""

import json
import os
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.chat import ChatError
from luthier.data.encoders.chat import TextEncoder
from luthier.data.encoders.plain_text import TextWindow, WindowEncoder
from luthier.errors import UserError

X = -100
B, E = 7, 8
WORDS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5, "?": 6, "<s>": B, "</s>": E}
IDS = [0, 1, 2, 3, 4, 5]


def words(adds="", **special):
    """A tokenizer whose tokens are words; `adds` are those it puts around a text itself."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [(token, WORDS[token]) for token in ("<s>", "</s>")]
    if adds:
        backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **special)


def pieces(**special):
    """A byte-level tokenizer with control tokens, special and not."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["a lute and a luthier </s> <|user|> <think>"] * 4, trainer)
    backend.add_special_tokens(["</s>", "<|user|>"])
    backend.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


@pytest.mark.parametrize(
    ("adds", "ids"),
    [
        pytest.param("", [0, 1, E], id="an-end-is-put"),
        pytest.param("<s> $A", [B, 0, 1, E], id="the-tokenizer's-beginning"),
        pytest.param("<s> $A </s>", [B, 0, 1, E], id="the-tokenizer's-end-stands-once"),
    ],
)
def test_what_stands_around_a_document(adds, ids):
    encoder = WindowEncoder(words(adds, eos_token="</s>"), None)
    assert encoder.encode_batch(["a b"]) == [[TextWindow(ids, ids)]]


@pytest.mark.parametrize(
    ("max_length", "stride", "windows"),
    [
        pytest.param(None, 0, [([B, *IDS, E], [B, *IDS, E])], id="whole"),
        pytest.param(8, 0, [([B, *IDS, E], [B, *IDS, E])], id="just-fits"),
        pytest.param(
            5, 0, [([B, 0, 1, 2, 3], [B, 0, 1, 2, 3]), ([4, 5, E], [4, 5, E])], id="no-overlap"
        ),
        pytest.param(
            5,
            1,
            [([B, 0, 1, 2, 3], [B, 0, 1, 2, 3]), ([3, 4, 5, E], [X, 4, 5, E])],
            id="overlap-is-context",
        ),
        pytest.param(
            4,
            2,
            [
                ([B, 0, 1, 2], [B, 0, 1, 2]),
                ([1, 2, 3, 4], [X, X, 3, 4]),
                ([3, 4, 5, E], [X, X, 5, E]),
            ],
            id="last-window-full",
        ),
        pytest.param(
            7,
            6,
            [([B, *IDS], [B, *IDS]), ([*IDS, E], [X, X, X, X, X, X, E])],
            id="one-new-token",
        ),
    ],
)
def test_a_long_document_in_windows(max_length, stride, windows):
    encoder = WindowEncoder(words("<s> $A", eos_token="</s>"), max_length, stride)
    assert encoder.encode_batch(["a b c d e f"]) == [[TextWindow(*window) for window in windows]]


@pytest.mark.parametrize("stride", [0, 1, 2, 4])
def test_every_token_trains_once(stride):
    encoder = WindowEncoder(words("<s> $A", eos_token="</s>"), 5, stride)
    for count in range(1, 40):
        ids = [place % 6 for place in range(count)]
        (windows,) = encoder.encode_batch([" ".join("abcdef"[index] for index in ids)])
        trained = [label for window in windows for label in window.labels if label != X]
        assert trained == [B, *ids, E]
        assert all(len(window.input_ids) <= 5 for window in windows)
        assert all(
            label in (X, index)
            for window in windows
            for index, label in zip(window.input_ids, window.labels, strict=True)
        )


def test_windows_share_no_lists():
    (window,) = WindowEncoder(words(eos_token="</s>"), None).encode_batch(["a"])[0]
    window.labels[0] = X
    assert window.input_ids == [0, E]


def test_documents_stay_in_order_and_an_empty_one_gives_nothing():
    encoder = WindowEncoder(words(eos_token="</s>"), None)
    found = encoder.encode_batch(iter(["a", "", "b", "   ", "c"]))
    assert [[w.input_ids for w in windows] for windows in found] == [
        [[0, E]],
        [],
        [[1, E]],
        [],
        [[2, E]],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a </s> lute",
        "</s>",
        "</s></s>a",
        "a lute</s>",
        "<|user|>\na luthier</s>\n",
        "plain",
    ],
)
def test_text_never_becomes_a_control_token(text):
    tokenizer = pieces()
    encoder = WindowEncoder(tokenizer, None)
    ids = encoder.encode_batch([text])[0][0].input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[:-1]) & set(tokenizer.convert_tokens_to_ids(["</s>", "<|user|>"]))
    assert tokenizer.decode(ids[:-1]) == text


def test_added_tokens_of_the_template_are_control_tokens_too():
    template = "<think>{{ messages[0].content }}"
    thought = pieces().convert_tokens_to_ids("<think>")
    plain = WindowEncoder(pieces(), None).encode_batch(["a <think>"])[0][0]
    taken = WindowEncoder(pieces(chat_template=template), None).encode_batch(["a <think>"])[0][0]
    assert thought in plain.input_ids
    assert thought not in taken.input_ids


def test_a_control_token_that_stays_one_names_its_document():
    encoder = WindowEncoder(words(eos_token="</s>"), None)
    with pytest.raises(ChatError, match="row 1: '</s>' is in the row's text"):
        encoder.encode_batch(["a", "a </s> b"])


def test_settings_that_others_left_on_the_tokenizer_change_nothing():
    tokenizer = words(eos_token="</s>", pad_token="?")
    encoder = WindowEncoder(tokenizer, None)
    tokenizer(["a b c", "a"], truncation=True, max_length=1, padding="max_length")
    assert encoder.encode_batch(["a b c", "a"])[0][0].input_ids == [0, 1, 2, E]


@pytest.mark.parametrize(
    ("special", "settings", "parts"),
    [
        pytest.param({}, (None,), ["end token", "eos_token", "model.tokenizer"], id="no-end"),
        pytest.param(
            {"eos_token": "</s>"}, (4, 4), ["dataset.stride=4", "chat.max_length=4"], id="stride"
        ),
    ],
)
def test_mistakes_in_words(special, settings, parts):
    with pytest.raises(UserError) as error:
        WindowEncoder(words(**special), *settings)
    assert all(part in str(error.value) for part in parts)


def test_the_settings_are_what_decides_the_windows():
    def settings(adds="", **more):
        return WindowEncoder(words(adds, eos_token="</s>"), **{"max_length": 8, **more}).settings()

    assert settings() == settings()
    assert json.loads(json.dumps(settings())) == settings()
    others = [
        settings(max_length=9),
        settings(stride=1),
        settings("<s> $A"),
        settings(max_length=None),
    ]
    assert all(other != settings() for other in others)


ASSETS = os.environ.get("LUTHIER_ASSETS")
BEGINS = {
    "falcon": [],
    "gpt2": [],
    "llama2": [1],
    "llama3_1": [128000],
    "mistral_tekken_v3": [1],
    "mistral_v1": [1],
    "qwen3": [],
    "smollm2": [],
    "starcoder2": [],
}


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
@pytest.mark.parametrize("name", BEGINS)
def test_real_documents_with_real_tokenizers(name):
    tokenizer = AutoTokenizer.from_pretrained(Path(ASSETS, "tokenizers", name))
    lines = Path(ASSETS, "datasets/text/llamafactory_c4_demo.jsonl").read_text().split("\n")[:40]
    texts = [json.loads(line)["text"] for line in lines]
    forged = f"A forged {tokenizer.eos_token}{tokenizer.eos_token} end\n"
    *found, odd = WindowEncoder(tokenizer, None).encode_batch([*texts, forged])
    end = [tokenizer.eos_token_id]
    expected = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [w.input_ids for (w,) in found] == [[*BEGINS[name], *ids, *end] for ids in expected]
    inner = odd[0].input_ids[len(BEGINS[name]) : -1]
    assert not set(inner) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(inner, clean_up_tokenization_spaces=False).strip() == forged.strip()


@pytest.mark.parametrize("text", ["", "  ", "\n"], ids=["empty", "blank", "line"])
def test_an_empty_document_stops_or_drops_the_row(text):
    rows = [{"text": "a"}, {"text": text}, {"text": "b"}]
    tokenizer = words(eos_token="</s>")
    with pytest.raises(ChatError, match=r"row 1: the text is (empty|blank).*empty_replies=drop"):
        TextEncoder(tokenizer, None, 0).encode(rows)
    made = TextEncoder(tokenizer, None, 0, "drop").encode(rows)
    assert made.columns["input_ids"] == [[0, E], [1, E]]
    assert [outcome.reason for outcome in made.outcomes] == ["", "empty text", ""]
    trained = pickle.loads(pickle.dumps(TextEncoder(tokenizer, None, 0, "train")))
    assert trained.encode(rows).counts == [1, 0, 1]  # these tokens are words: no blank is one
