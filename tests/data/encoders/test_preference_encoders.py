"""Judged replies as token rows: same prompts, whole turns, nothing dropped without a word."""

import json
import os
import pickle
from itertools import product
from pathlib import Path

import pytest

from helpers.chatml import CHAT, CHATML, byte_tokenizer
from luthier.chat import ChatEncoder, ChatError
from luthier.data.encoders.preference import (
    PairSplittingEncoder,
    PreferenceEncoder,
    RewardEncoder,
    UnpairedEncoder,
)

ASSETS = os.environ.get("LUTHIER_ASSETS")
# The system line says how many messages there are: what follows a turn changes its prompt.
COUNTING = "{{ '<|im_start|>' ~ messages|length ~ '\\n' }}" + CHATML


def tokenizer(template=CHATML):
    special = ("<pad>", "<|im_start|>", "<|im_end|>")
    return byte_tokenizer((), special, pad_token="<pad>", chat_template=template)


TOKENIZER = tokenizer()


def say(role, content):
    return {"role": role, "content": content}


def user(content):
    return say("user", content)


def reply(content, **more):
    return [{**say("assistant", content), **more}]


LONG = [
    say("system", "Be brief."), user("One?"), *reply("first"), user("Two?"), *reply("second"),
    user("Three?"),
]  # fmt: skip


HI = user("Hi")


def pair(prompt=(HI,), chosen=None, rejected=None, **more):
    chosen, rejected = chosen or reply("Hello."), rejected or reply("No")
    return {"prompt": list(prompt), "chosen": chosen, "rejected": rejected, **more}


def encode(example, make=PreferenceEncoder, tok=TOKENIZER, **settings):
    return make(tok, CHAT | settings).encode([example])


def row(made, number=0):
    return {name: column[number] for name, column in made.columns.items()}


def text(ids):
    return TOKENIZER.decode(ids)


def test_both_replies_stand_behind_the_ids_that_generation_starts_from():
    example = pair(LONG, reply("the third"), reply("\n\nno such thing"))
    made = row(encode(example))
    chat = ChatEncoder(TOKENIZER, date="2026-01-01")
    assert made["prompt_ids"] == chat.prompt(LONG)
    assert text(made["chosen_ids"]) == "the third<|im_end|>"
    assert text(made["rejected_ids"]) == "\n\nno such thing<|im_end|>"
    assert made["chosen_spans"] == [0, len("the third") + 1]
    longest = len(made["prompt_ids"]) + len("\n\nno such thing") + 1
    assert made["length"] == longest
    assert made["tokens"] == longest + len(made["prompt_ids"]) + len("the third") + 1
    assert made["trained"] == len("the third") + 1 + len("\n\nno such thing") + 1


def test_of_a_reply_of_several_turns_only_the_models_own_words_train():
    chosen = [*reply("Look."), say("tool", "12 km"), *reply("It is far.")]
    made = row(encode(pair(chosen=chosen)))
    ids, (begin, stop, again, end) = made["chosen_ids"], made["chosen_spans"]
    assert text(ids[begin:stop]) == "Look.<|im_end|>"
    assert "12 km" in text(ids[stop:again])
    assert text(ids[again:end]) == "It is far.<|im_end|>"
    assert end == len(ids)


@pytest.mark.parametrize("on_lost", ["error", "drop"])
def test_prompts_that_the_template_writes_in_two_ways_are_reported(on_lost):
    example = pair(chosen=[*reply("a"), user("more"), *reply("b")])
    tok = tokenizer(COUNTING)
    if on_lost == "error":
        with pytest.raises(ChatError, match="the template writes") as caught:
            encode(example, tok=tok)
        assert caught.value.row == 0
    else:
        made = encode(example, tok=tok, on_lost="drop")
        assert made.counts == [0]
        assert made.outcomes[0].reason in ("template rewrites the reply", "different prompts")


def test_a_reply_whose_first_turn_does_not_train_has_another_prompt():
    chosen = [*reply("Look.", train=False), user("And?"), *reply("Far.")]
    made = encode(pair(chosen=chosen), on_lost="drop")
    assert made.counts == [0]
    assert made.outcomes[0].reason == "different prompts"


def test_a_mistake_names_the_reply_and_the_row():
    broken = pair(rejected=[say("assistant", None)])
    with pytest.raises(ChatError, match=r"rejected: .*no content") as caught:
        PreferenceEncoder(TOKENIZER, CHAT).encode([pair(), broken])
    assert caught.value.row == 1


def test_a_long_row_loses_the_same_turns_of_the_prompt_for_both_replies():
    example = pair(LONG, reply("x"), reply("y" * 30))
    whole = row(encode(example))["length"]
    made = encode(example, max_length=whole - 1)
    cut = row(made)
    assert made.outcomes[0].cut_turns == 0
    assert text(cut["prompt_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\nsecond<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert cut["length"] <= whole - 1
    shortest = row(encode(example, max_length=cut["length"] - 1))
    assert "Two?" not in text(shortest["prompt_ids"])
    assert "Be brief." in text(shortest["prompt_ids"])
    assert encode(example, max_length=whole).outcomes[0].cut_turns is None


@pytest.mark.parametrize("on_long", ["turns", "drop"])
def test_a_row_that_cannot_be_cut_is_left_out_and_counted(on_long):
    example = pair(LONG, reply("x" * 200))
    made = encode(example, max_length=100, on_long=on_long)
    assert made.counts == [0]
    assert made.outcomes[0].reason == "too long"
    with pytest.raises(ChatError, match=r"chat\.max_length is 100"):
        encode(example, max_length=100, on_long="error")


def test_a_reply_with_a_verdict():
    example = {"prompt": [user("Hi")], "completion": reply("Yo"), "label": False}
    made = row(encode(example, UnpairedEncoder))
    assert text(made["completion_ids"]) == "Yo<|im_end|>"
    assert (made["label"], made["trained"]) == (0, 3)


def test_a_pair_is_two_replies_with_a_verdict():
    made = encode(pair(), PairSplittingEncoder)
    assert made.counts == [2]
    found = [(text(row(made, n)["completion_ids"]), row(made, n)["label"]) for n in range(2)]
    assert found == [("Hello.<|im_end|>", 1), ("No<|im_end|>", 0)]


def test_a_reward_model_reads_whole_conversations_to_the_end():
    made = row(encode(pair(LONG), RewardEncoder))
    whole = TOKENIZER.apply_chat_template([*LONG, *reply("Hello.")], tokenize=False)
    assert text(made["chosen_ids"]) == whole
    assert whole.endswith("<|im_end|>\n")
    assert made["length"] == max(len(made["chosen_ids"]), len(made["rejected_ids"]))


MOODY = "{{ mood }}" + CHATML
MOOD = {"mood": "calm"}


@pytest.mark.parametrize("make", [PreferenceEncoder, PairSplittingEncoder, RewardEncoder])
@pytest.mark.parametrize("prompt", [[HI], LONG], ids=["short", "cut"])
def test_a_row_has_variables_of_its_own(make, prompt):
    settings = {"template": MOODY, "max_length": 110}
    own = encode(pair(prompt, chat_template_kwargs=MOOD), make, **settings)
    of_all = encode(pair(prompt), make, **settings, variables=MOOD)
    assert own.columns == of_all.columns and own.outcomes == of_all.outcomes
    assert own.columns != encode(pair(prompt), make, **settings).columns


def test_a_rated_reply_has_variables_of_its_own():
    rated = {"prompt": [HI], "completion": reply("Hello."), "label": True}
    own = encode(rated | {"chat_template_kwargs": MOOD}, UnpairedEncoder, template=MOODY)
    of_all = encode(rated, UnpairedEncoder, template=MOODY, variables=MOOD)
    assert own.columns == of_all.columns
    assert text(row(own)["prompt_ids"]).startswith("calm")


def test_settings_tell_what_decides_the_rows():
    kinds = (PreferenceEncoder, UnpairedEncoder, PairSplittingEncoder, RewardEncoder)
    found = [make(TOKENIZER, CHAT | {"max_length": 9}).settings() for make in kinds]
    assert len({str(settings) for settings in found}) == 4
    assert all(settings["max_length"] == 9 for settings in found)


def test_an_encoder_goes_to_another_process():
    encoder = pickle.loads(pickle.dumps(PreferenceEncoder(TOKENIZER, CHAT)))
    assert encoder.encode([pair()]).columns == encode(pair()).columns


def test_nothing_left_makes_no_rows():
    made = encode(pair(reply("x"), reply("y" * 99)), max_length=20)
    assert made.counts == [0]
    assert not any(map(len, made.columns.values()))


@pytest.mark.parametrize("text", ["", " \n"], ids=["empty", "blank"])
@pytest.mark.parametrize(
    ("make", "side"),
    [
        *product([PreferenceEncoder, PairSplittingEncoder, RewardEncoder], ["chosen", "rejected"]),
        (UnpairedEncoder, "completion"),
    ],
)
def test_an_empty_reply_of_either_kind_stops_or_drops_the_row(make, side, text):
    example = unpaired(text) if side == "completion" else pair(**{side: reply(text)})
    with pytest.raises(ChatError, match=rf"row 0.*{side}.*reply is (empty|blank)"):
        encode(example, make, on_lost="drop")
    (outcome,) = encode(example, make, empty_replies="drop").outcomes
    assert (outcome.sequences, outcome.reason) == (0, "empty reply")
    assert encode(example, make, empty_replies="train").outcomes[0].sequences


def unpaired(text):
    return {"prompt": [HI], "completion": reply(text), "label": True}


@pytest.mark.skipif(ASSETS is None, reason="needs LUTHIER_ASSETS")
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3_1"])
def test_prompts_of_real_rows_are_those_of_transformers(name):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(f"{ASSETS}/tokenizers/{name}")
    lines = Path(f"{ASSETS}/datasets/preference/oasst_ranked_pairs.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines[:40]]
    made = PreferenceEncoder(tok, CHAT | {"date": "2024-07-26"}).encode(examples)
    assert made.counts == [1] * 40
    for number, example in enumerate(examples):
        ids = tok.apply_chat_template(
            example["prompt"], add_generation_prompt=True, date_string="26 Jul 2024"
        )["input_ids"]
        assert row(made, number)["prompt_ids"] == ids
        for side in ("chosen", "rejected"):
            assert example[side][0]["content"].strip() in tok.decode(
                row(made, number)[f"{side}_ids"]
            )
