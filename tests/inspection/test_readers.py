"""Rows of each kind of method in `luthier preview`: what is displayed is what trains."""

import json
from itertools import pairwise

import pytest

from helpers.outcome_rows import LUTE, STRINGS, TRIMMING

PROMPT = "|What| is| a| lute|?|{<|im_end|>}|↵\n|{<|im_start|>}|ass|istant|↵\n"
PAIR = {"prompt": "What is a lute?", "chosen": "A plucked instrument.", "rejected": "No."}
VERDICT = {"prompt": "What is a lute?", "completion": "No.", "label": False}
TAGGED = {"tokens": ["Hugo", "sings"], "tags": ["B-PER", "O"]}
MARKED = {
    "pair": ("dpo", PAIR, [
        "row 1, prompt  rows.jsonl:1  35 tokens",
        "row 1, chosen  6 tokens, 6 trained (100%), 41 with the prompt",
        "«A| pl|ucked| instrument|.|{<|im_end|>}»",
        "row 1, rejected  3 tokens, 3 trained (100%), 38 with the prompt, 3 padding",
        "«No|.|{<|im_end|>}» <|im_end|> × 3",
    ]),
    "verdict": ("kto", VERDICT, [
        "row 1, prompt  rows.jsonl:1  35 tokens",
        "row 1, a bad reply  3 tokens, 3 trained (100%), 38 with the prompt",
        "«No|.|{<|im_end|>}»",
    ]),
    "pair, each reply by itself": ("kto", PAIR, [
        "row 1, chosen, a good reply  6 tokens, 6 trained (100%), 41 with the prompt",
        "row 1, rejected, a bad reply  3 tokens, 3 trained (100%), 38 with the prompt, 3 padding",
    ]),
    "score": ("reward", PAIR, [
        "row 1, prompt  rows.jsonl:1  35 tokens",
        "row 1, chosen  7 tokens, 42 with the prompt; its score at the last token trains",
        "A| pl|ucked| instrument|.|{<|im_end|>}|↵",
    ]),
    "label": ("classify", {"text": "Buy now!", "label": "spam"}, [
        "row 1, label spam  rows.jsonl:1  3 tokens; its label trains", "Buy| now|!",
    ]),
    "labels": ("classify", {"text": "Buy now!", "label": ["spam", "shop"]}, [
        "row 1, labels spam, shop  rows.jsonl:1  3 tokens; its label trains",
    ]),
    "tags": ("tag", TAGGED, [
        "row 1  rows.jsonl:1  4 tokens, 2 trained (50%)", "«H=B-PER»|ug|o|« sings=O»",
    ]),
    "target": ("seq2seq", {"source": "A lute.", "target": "A lyre."}, [
        "row 1, source  rows.jsonl:1  3 tokens", "A| lute|.",
        "row 1, target  5 tokens, 5 trained (100%)", "«A| ly|re|.|{<|im_end|>}»",
    ]),
}  # fmt: skip


@pytest.mark.parametrize("method, row, lines", MARKED.values(), ids=MARKED)
def test_a_row_in_marks(method, row, lines, on_rows):
    code, out, err = on_rows("preview", [row], f"trainer={method}")
    assert (code, err) == (0, "")
    for line in lines:
        assert line in out.splitlines()
    if "prompt" in row:
        # The prompt stands once before its replies.
        assert out.count(PROMPT) == 1
    assert ("=TAG" in out.splitlines()[0]) is (method == "tag")


def stored_sequences(row):
    """The ids of each sequence of a stored token row, and which of them train."""
    for name in ("chosen", "rejected", "completion"):
        if f"{name}_ids" in row:
            prompt, ids = [*row.get("prompt_ids", ())], [*row[f"{name}_ids"]]
            trained = [False] * len(ids)
            for start, stop in list(pairwise(row.get(f"{name}_spans", ())))[::2]:
                trained[start:stop] = [True] * (stop - start)
            yield prompt + ids, [False] * len(prompt) + trained
    if "input_ids" in row:
        trained = [word >= 0 for word in row.get("words", [-1] * len(row["input_ids"]))]
        yield [*row["input_ids"]], trained
    if "input_ids" in row and "labels" in row:
        yield [*row["labels"]], [True] * len(row["labels"])


def displayed_sequences(parts):
    """The same of what is displayed: each reply behind its prompt."""
    prompt = []
    for part in parts:
        if part["part"] == "prompt":
            prompt = part["tokens"]
            continue
        tokens = prompt + part["tokens"]
        yield [token["id"] for token in tokens], [token["trained"] for token in tokens]


TURNS = [LUTE, STRINGS, {"role": "user", "content": "And?"}]
SEVERAL = [{"role": "assistant", "content": "Well."}, *TURNS[2:], STRINGS]
LONG = [LUTE, {"role": "assistant", "content": "long " * 60}, LUTE]
ROWS = {
    "turns": ("dpo", {"prompt": TURNS, "chosen": "Strings.", "rejected": "No."}),
    "replies of several turns": ("orpo", {"prompt": [LUTE], "chosen": SEVERAL, "rejected": "No."}),
    "a prompt that is cut": ("cpo", {"prompt": LONG, "chosen": "Strings.", "rejected": "No."}),
    **{name: (method, row) for name, (method, row, _) in MARKED.items()},
}


@pytest.mark.parametrize("method, row", ROWS.values(), ids=ROWS)
def test_what_is_displayed_is_what_trains(method, row, on_rows, tmp_path):
    from luthier.config import load_config
    from luthier.data.prepare import prepare
    from luthier.model.tokenizer import load_tokenizer
    from luthier.train.methods import make_row_encoders

    words = [f"trainer={method}", "chat.max_length=64"]
    code, out, err = on_rows("preview", [row], "--json", *words)
    assert (code, err) == (0, "")
    words += ["model=smollm2_135m", "dataset=jsonl", "dataset.path=rows.jsonl"]
    words += ["dataset.eval.share=null", "trainer.args.eval_strategy=no"]
    config = load_config([*words, f"dataset.cache={tmp_path / 'cache'}"]).config
    tokenizer = load_tokenizer(config.model)
    rows = prepare(config.dataset, make_row_encoders(config, tokenizer), tokenizer, 1).train
    stored = [pair for n in rows.index for pair in stored_sequences(rows.table.row(n))]
    assert stored and [*displayed_sequences(json.loads(out)["rows"])] == stored


ORIGINS = {
    "reply": ("dpo", PAIR, [], {("assistant", 1, "content"), (None, None, None)}),
    "reply behind a prompt that was cut": (
        "dpo", {"prompt": LONG, "chosen": "Strings.", "rejected": "No."}, ["chat.max_length=64"],
        {("assistant", 3, "content"), (None, None, None)},
    ),
    "tags": ("tag", TAGGED, [], {(None, None, "text")}),
}  # fmt: skip


@pytest.mark.parametrize("method, row, words, origins", ORIGINS.values(), ids=ORIGINS)
def test_json_says_where_tokens_are_from(method, row, words, origins, on_rows):
    _, out, _ = on_rows("preview", [row], "--json", f"trainer={method}", *words)
    parts = json.loads(out)["rows"]
    trained = [token for part in parts for token in part["tokens"] if token["trained"]]
    assert {(token["role"], token["message"], token["field"]) for token in trained} == origins
    if method == "tag":
        assert [token.get("tag") for token in parts[0]["tokens"]] == ["B-PER", None, None, "O"]


STATES = {
    "dropped": (
        "dpo", {**PAIR, "chosen": "word " * 90}, ["chat.max_length=60"],
        "dropped: it has 127 tokens, and chat.max_length is 60; no whole turns of its prompt can",
    ),
    "cut": (
        "dpo", {"prompt": LONG, "chosen": "Strings.", "rejected": "No."}, ["chat.max_length=64"],
        "cut to fit chat.max_length: its first turns were removed; every reply still trains",
    ),
    "stops": (
        "kto", {**VERDICT, "completion": ""}, [],
        "training stops here: completion: message 1, field `content`: the assistant's reply is",
    ),
    "text that is cut": (
        "classify", {"text": "lute " * 9, "label": "a"}, ["chat.max_length=8"],
        "cut to fit chat.max_length: the end of its text was removed",
    ),
    "no preference": (
        "orpo", {**PAIR, "rejected": " A plucked instrument. "}, ["chat.template=trim.jinja"],
        "no preference: chosen and rejected are the same tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method, row, words, said", STATES.values(), ids=STATES)
def test_what_becomes_of_a_row(method, row, words, said, on_rows, tmp_path):
    (tmp_path / "trim.jinja").write_text(TRIMMING)
    code, out, _ = on_rows("preview", [row], f"trainer={method}", *words)
    assert code == 0 and said in out


def picture_pair(*names):
    parts = [{"type": "image", "image": f"{name}.png"} for name in names]
    return {
        **PAIR,
        "prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}],
    }


def test_the_pictures_of_a_pair_stand_in_its_prompt(on_images, tmp_path):
    rows = [picture_pair("wide", "tall")]
    code, out, err = on_images("preview", rows, "trainer=dpo")
    assert (code, err) == (0, "")
    heading = next(line for line in out.splitlines() if line.startswith("row 1, prompt"))
    assert heading.endswith(", 8 for 2 images")
    assert out.count("[image 60x28: 4 tokens]") == out.count("[image 28x300: 4 tokens]") == 1
    on_images("preview", rows, "trainer=dpo", "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img src="data:image/') == 2 and page.count('class="row part"') == 2
    assert "message 0, user, image: tall.png" in page


def test_a_picture_keeps_its_file_where_the_prompt_is_cut(on_images):
    lost, kept = (picture_pair(name)["prompt"][0] for name in ("wide", "tall"))
    row = {**PAIR, "prompt": [lost, {"role": "assistant", "content": "word " * 20}, kept]}
    code, out, err = on_images("preview", [row], "trainer=dpo", "chat.max_length=80", "--json")
    assert (code, err) == (0, "")
    prompt = json.loads(out)["rows"][0]
    (image,) = prompt["images"]
    assert (image["number"], image["source"]) == (1, "tall.png")
    of_image = prompt["tokens"][image["start"] : image["start"] + image["tokens"]]
    assert {token["message"] for token in of_image} == {2}


def test_pictures_of_pairs_are_counted_and_decoded(on_images, broken_pixels):
    broken_pixels("wide.png")
    _, out, _ = on_images("check", [picture_pair("wide", "tall")], "trainer=dpo", "--json")
    found = json.loads(out)
    rules = {rule["text"]: rule["broken"] for rule in found["rules"]}
    assert rules["every image can be decoded"] == 1
    assert rules["prompts are those of apply_chat_template"] == 0
    side = found["sides"]["train"]
    # Both replies stand behind the two pictures of four tokens each.
    assert (side["images"], side["image_tokens"]) == (2, 16)


def test_a_method_of_text_alone_stops_at_a_picture(on_images):
    code, out, _ = on_images("preview", [picture_pair("wide")], "trainer=reward")
    assert code == 0
    assert "training stops here: message 0, field `image`: the message has an image, and" in out
    assert "trainer.method=reward trains on text only" in out
