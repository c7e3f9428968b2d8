"""Texts, words and targets as token rows: held against the tokenizers themselves."""

import json
import os
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.chat import ChatError
from luthier.data.encoders.chat import RowOutcome, RowState, hash_sequences
from luthier.data.encoders.tasks import ClassificationEncoder, Seq2SeqEncoder, TaggingEncoder
from luthier.errors import UserError

ASSETS = os.environ.get("LUTHIER_ASSETS")
C, S, E = 7, 8, 9
WORDS = {"a": 0, "b": 1, "c": 2, "d": 3, "##x": 4, "?": 5, "[P]": 6, "[C]": C, "[S]": S, "</s>": E}


def words(single="[C] $A [S]", pair="[C] $A [S] $B:1 [S]:1", types=True, **special):
    """A tokenizer whose tokens are letters, with what it puts around texts as BERT does."""
    backend = Tokenizer(models.WordPiece(WORDS, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    known = [(token, WORDS[token]) for token in ("[C]", "[S]", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=known
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[P]", unk_token="?", cls_token="[C]", sep_token="[S]",
        model_input_names=names, **special,
    )  # fmt: skip


def classified(examples, max_length=None, on_long="turns", **tokenizer):
    return ClassificationEncoder(words(**tokenizer), max_length, on_long).encode(examples)


def test_a_text_and_its_label():
    made = classified([{"text": "a bx", "label": "red"}, {"text": "c", "label": 3}])
    assert made.columns == {
        "input_ids": [[C, 0, 1, 4, S], [C, 2, S]],
        "token_type_ids": [[0, 0, 0, 0, 0], [0, 0, 0]],
        "label": ['"red"', "3"],
        "trained": [1, 1],
    }
    assert made.outcomes == [RowOutcome(1), RowOutcome(1)]


def test_a_pair_has_segments():
    made = classified([{"text": "a b", "text_pair": "c", "label": [1, 2]}])
    assert made.columns["input_ids"] == [[C, 0, 1, S, 2, S]]
    assert made.columns["token_type_ids"] == [[0, 0, 0, 0, 1, 1]]
    assert made.columns["label"] == ["[1, 2]"]
    assert "token_type_ids" not in classified([{"text": "a", "label": 1}], types=False).columns


def test_text_never_becomes_a_control_token():
    (ids,) = classified([{"text": "a [S] b", "label": 1}]).columns["input_ids"]
    assert ids.count(S) == 1
    assert (ids[:2], ids[-2:]) == ([C, 0], [1, S])


def test_an_empty_text_is_left_out():
    made = classified([{"text": " ", "label": 1}, {"text": "", "text_pair": "a", "label": 1}])
    assert made.counts == [0, 1]
    assert made.outcomes[0][1:4] == (RowState.DROPPED, "empty text", "the text is empty")
    assert made.columns["input_ids"] == [[C, S, 0, S]]


@pytest.mark.parametrize(
    ("example", "limit", "ids"),
    [
        pytest.param({"text": "a b c"}, 4, [C, 0, 1, S], id="its-end"),
        pytest.param({"text": "a b c"}, 5, [C, 0, 1, 2, S], id="nothing-where-it-fits"),
        pytest.param(
            {"text": "a b c d", "text_pair": "d"}, 6, [C, 0, 1, S, 3, S], id="the-longer-of-two"
        ),
        pytest.param(
            {"text": "a b c", "text_pair": "d d d"}, 6, [C, 0, S, 3, 3, S], id="both-where-alike"
        ),
    ],
)
def test_what_is_cut(example, limit, ids):
    made = classified([example | {"label": 1}], limit)
    assert made.columns["input_ids"] == [ids]
    whole = sum(len(text.split()) for text in example.values()) + 1 + len(example)
    assert made.outcomes[0].cut_turns == (0 if whole > limit else None)


def test_long_rows_may_be_left_out_or_stop():
    rows = [{"text": "a", "label": 1}, {"text": "a b c", "label": 1}]
    made = classified(rows, 4, "drop")
    assert made.counts == [1, 0]
    assert made.outcomes[1][2:4] == (
        "longer than chat.max_length", "the row has 5 tokens, and chat.max_length is 4"
    )  # fmt: skip
    with pytest.raises(ChatError, match=r"row 1: the row has 5 tokens.*chat\.on_long=turns"):
        classified(rows, 4, "error")


def test_a_length_without_room_in_words():
    with pytest.raises(UserError, match=r"chat\.max_length=2 leaves no room .* adds 2 tokens"):
        classified([{"text": "a", "label": 1}], 2)


def tagged(examples, max_length=None, on_long="turns"):
    return TaggingEncoder(words(), max_length, on_long).encode(examples)


def test_words_are_known_by_their_first_token():
    made = tagged([{"tokens": ["axx", "b", "cx"], "tags": ["B-N", "O", 3]}])
    assert made.columns == {
        "input_ids": [[C, 0, 4, 4, 1, 2, 4, S]],
        "words": [[-1, 0, -1, -1, 1, 2, -1, -1]],
        "tags": ['["B-N", "O", 3]'],
        "trained": [3],
    }


def test_a_long_sentence_loses_whole_words():
    made = tagged([{"tokens": ["a", "bx", "c"], "tags": [1, 2, 3]}], 4)
    assert made.columns["input_ids"] == [[C, 0, S]]
    assert made.columns["words"] == [[-1, 0, -1]]
    assert (made.columns["tags"], made.columns["trained"]) == (["[1, 2, 3]"], [1])
    assert made.outcomes[0].cut_turns == 0


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [(["", " "], "empty text"), (["axxx"], "longer than chat.max_length")],
    ids=["no-token-at-all", "first-word-too-long"],
)
def test_sentences_without_a_word_are_left_out(tokens, reason):
    made = tagged([{"tokens": tokens, "tags": [1] * len(tokens)}], 5)
    assert (made.counts, made.outcomes[0].reason) == ([0], reason)
    assert made.columns["input_ids"] == []


def test_a_word_without_a_token_does_not_train():
    made = tagged([{"tokens": ["a", "", "b"], "tags": [1, 2, 3]}])
    assert made.columns["words"] == [[-1, 0, 2, -1]]
    assert made.columns["trained"] == [2]


def targeted(examples, max_length=None, single="$A </s>", on_long="turns", empty_replies="error"):
    tokenizer = words(single=single, types=False, eos_token="</s>")
    return Seq2SeqEncoder(tokenizer, max_length, on_long, empty_replies).encode(examples)


@pytest.mark.parametrize(
    ("single", "source", "target"),
    [
        pytest.param("$A </s>", [0, 1, E], [2, E], id="as-t5"),
        pytest.param("[C] $A </s>", [C, 0, 1, E], [C, 2, E], id="as-bart"),
        pytest.param("$A", [0, 1], [2, E], id="an-end-is-put-behind-the-target"),
    ],
)
def test_a_target_ends_once(single, source, target):
    made = targeted([{"source": "a b", "target": "c"}], single=single)
    assert made.columns == {
        "input_ids": [source], "labels": [target], "trained": [len(target)]
    }  # fmt: skip


def test_a_cut_target_has_no_end():
    made = targeted([{"source": "a", "target": "a b c d"}, {"source": "a", "target": "a b"}], 3)
    assert made.columns["labels"] == [[0, 1, 2], [0, 1, E]]
    assert made.outcomes[0].cut_turns == 0
    made = targeted([{"source": "a", "target": "a b c d"}], 3, on_long="drop")
    assert made.outcomes[0].problem == "the row has 5 tokens, and chat.max_length is 3"


@pytest.mark.parametrize("target", ["", " "], ids=["empty", "blank"])
def test_an_empty_source_is_left_out_and_an_empty_target_is_an_error(target):
    rows = [{"source": "", "target": "a"}, {"source": "a", "target": target}]
    with pytest.raises(ChatError, match=r"row 1: the target is (empty|blank), so the model would"):
        targeted(rows)
    made = targeted(rows, empty_replies="drop")
    assert made.outcomes[0][1:4] == (RowState.DROPPED, "empty source", "its source is empty")
    assert made.outcomes[1][1:3] == (RowState.DROPPED, "empty target")
    assert targeted(rows, empty_replies="train").columns["labels"] == [[E]]


def test_a_target_needs_an_end_token():
    encoder = Seq2SeqEncoder(words(single="$A"), None, "turns")
    with pytest.raises(UserError, match="has none"):
        encoder.encode([{"source": "a", "target": "b"}])


@pytest.mark.parametrize("kind", [ClassificationEncoder, TaggingEncoder, Seq2SeqEncoder])
def test_settings_are_json_and_the_encoder_travels(kind):
    encoder = kind(words(eos_token="</s>"), 8, "drop")
    settings = encoder.settings()
    assert json.loads(json.dumps(settings))["max_length"] == 8
    assert pickle.loads(pickle.dumps(encoder)).settings() == settings
    assert kind(words(eos_token="</s>"), 9, "drop").settings() != settings
    assert kind(words("$A", "$A $B", eos_token="</s>"), 8, "drop").settings() != settings


def test_rows_with_other_labels_have_other_hashes():
    made = classified([{"text": "a", "label": label} for label in ("1", 1, 1)])
    first, second, third = hash_sequences(made.columns)
    assert first != second == third


TEXTS = [
    "Where is my card?", " two  spaces ", "Naïve café 琵琶\n\nαβγ", "x" * 40, "1,234.50 $", "\tTab",
    "don't", "🎸 lutes!",
]  # fmt: skip


def real(name):
    return AutoTokenizer.from_pretrained(Path(ASSETS, "tokenizers", name))


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
@pytest.mark.parametrize("name", ["smollm2", "llama2", "llama3_1", "qwen3", "mistral_v1", "gpt2"])
def test_ids_are_those_of_real_tokenizers(name):
    tokenizer = real(name)
    examples = [{"text": text, "label": 1} for text in TEXTS]
    examples += [{"text": text, "text_pair": TEXTS[-1], "label": 1} for text in TEXTS]
    made = ClassificationEncoder(tokenizer, None, "turns").encode(examples)
    expected = [
        tokenizer(example["text"], example.get("text_pair"))["input_ids"] for example in examples
    ]
    assert made.columns["input_ids"] == expected


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
@pytest.mark.parametrize("name", ["smollm2", "llama2", "llama3_1", "qwen3", "mistral_v1", "gpt2"])
def test_words_make_the_text_that_they_are_of(name):
    tokenizer = real(name)
    rows = [text.split() for text in TEXTS] + [["EU", "rejects", "German", "call", "-1.5%", "."]]
    examples = [{"tokens": row, "tags": [1] * len(row)} for row in rows]
    made = TaggingEncoder(tokenizer, None, "turns").encode(examples)
    assert made.columns["input_ids"] == [tokenizer(" ".join(row))["input_ids"] for row in rows]
    assert made.columns["trained"] == [len(row) for row in rows]


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
def test_pairs_are_cut_as_tokenizers_cut_them():
    tokenizer = real("llama2")
    for left in range(1, 12):
        for limit in range(6, 16):
            pair = "a " * left + "b", "c d e f g"
            encoder = ClassificationEncoder(tokenizer, limit, "turns")
            example = {"text": pair[0], "text_pair": pair[1], "label": 1}
            cut = tokenizer(*pair, truncation=True, max_length=limit)["input_ids"]
            assert encoder.encode([example]).columns["input_ids"] == [cut]
