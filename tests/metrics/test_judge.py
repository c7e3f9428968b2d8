"""A judge as a reward: what it is asked, what its answers mean, and what happens without one."""

import asyncio
import time

import pytest

from helpers.judge_server import judging
from luthier.errors import UserError
from luthier.metrics import judge as judges
from luthier.metrics.rewards import check_rewards, parse_rewards, prepare_rewards

ASKED = {"model": "gpt", "prompt": "Rate {reply}"}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Pauses between tries are of a hundredth of their length."""
    sleep = asyncio.sleep
    monkeypatch.setattr(judges.asyncio, "sleep", lambda seconds: sleep(seconds / 100))


def reward_of(**settings):
    ((reward,), _) = parse_rewards([ASKED | {"judge": "http://127.0.0.1:9/v1"} | settings])
    return reward


def judged(reward, texts, prompt="q", **columns):
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"role": "user", "content": prompt}]] * len(texts)
    return asyncio.run(reward(prompts=prompts, completions=completions, **columns))


@pytest.mark.parametrize(
    ("settings", "answer", "verdict"),
    [
        ({}, "7", 7),
        ({}, "I say -0.5.", -0.5),
        ({}, "7/10", None),
        ({}, "7 of 7", 7),
        ({}, "no idea", None),
        ({}, "", None),
        ({"marker": "Score:"}, "2 mistakes. Score: 7/10", 7),
        ({"marker": "Score:"}, "Score: 3, or rather Score: 4", 4),
        ({"marker": "Score:"}, "7", None),
        ({"range": [0, 10]}, "7", 7),
        ({"range": [0, 10]}, "11", None),
        ({}, "<think>3 or 4?</think>\n4", 4),
        ({"choices": {"good": 1, "very good": 2, "bad": -1}}, "It is good.", 1),
        ({"choices": {"good": 1, "very good": 2, "bad": -1}}, "It is very good.", 2),
        ({"choices": {"good": 1, "bad": -1}}, "good, not bad", None),
        ({"choices": {"good": 1, "bad": -1}}, "goodness", None),
        ({"choices": {"A": 1, "B": 0}, "marker": "Verdict:"}, "A tie? Verdict: B", 0),
    ],
)
def test_a_verdict_is_one_number_or_one_choice(settings, answer, verdict):
    assert reward_of(**settings).read_verdict(answer) == verdict


def test_requests_answers_and_what_is_remembered():
    with judging(lambda body, number: str(len(body["messages"][0]["content"]))) as judge:
        reward = reward_of(
            judge=judge.address, prompt='{prompt}|{reply}|{level}|{"a": {other}}', parallel=2,
            weight=0.5, request={"temperature": 0, "seed": 3},
        )  # fmt: skip
        columns = {"level": [1, None, {"x": "é"}, 1, 5, 6], "trainer_state": None}
        scores = judged(reward, ["{level}", "b", "c", "{level}", "d", "e"], **columns)
        assert sorted(judge.questions) == sorted(
            f'q|{reply}|{level}|{{"a": {{other}}}}'
            for reply, level in
            [("{level}", "1"), ("b", "null"), ("c", '{"x": "é"}'), ("d", "5"), ("e", "6")]
        )  # fmt: skip
        assert judge.most_under_way == 2
        assert set(judge.keys) == {None}
        assert judge.requests[0] == {
            "model": "gpt", "temperature": 0, "seed": 3, "messages": judge.requests[0]["messages"],
        }  # fmt: skip
        assert scores[0] == scores[3] and len(set(scores)) > 1
        assert judged(reward, ["b"], level=[None]) == scores[1:2]
        assert len(judge.requests) == 5


def test_a_prompt_of_several_messages_is_told_with_its_roles():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    text = 'system: Be kind.\n\nassistant: [{"function": {"name": "add"}}]\n\nuser: hi'
    assert judges.conversation_text(messages) == text


def test_the_key_is_sent_and_in_no_message(monkeypatch):
    monkeypatch.setenv("LOGIN_OF_JUDGE", "abc-123")
    with judging(lambda body, number: (401, "who is that?")) as judge:
        reward = reward_of(judge=judge.address, key_variable="LOGIN_OF_JUDGE")
        with pytest.raises(UserError, match="refuses: HTTP 401 'who is that") as refused:
            judged(reward, ["a"])
        assert judge.keys == ["Bearer abc-123"]
    assert "The key is that of the variable LOGIN_OF_JUDGE" in str(refused.value)
    assert "abc-123" not in str(refused.value) + repr(reward)
    monkeypatch.delenv("LOGIN_OF_JUDGE")
    with pytest.raises(UserError, match="export LOGIN_OF_JUDGE"):
        judged(reward, ["a"])


@pytest.mark.parametrize(
    "failure",
    [(503, "busy"), (429, "slow down", {"Retry-After": "0.1"}), (500, "")],
    ids=["busy", "rate limit", "broken"],
)
def test_what_passes_is_tried_again(failure):
    with judging(lambda body, number: failure if number < 3 else "1") as judge:
        assert judged(reward_of(judge=judge.address), ["a"]) == [1]
        assert len(judge.requests) == 3


def slow(body, number):
    time.sleep(0.5)
    return "1"


@pytest.mark.parametrize(
    ("answer", "settings", "words", "requests"),
    [
        (lambda *_: (503, "busy"), {"retries": 2}, "no answer in 3 tries.*HTTP 503 'busy'", 3),
        (slow, {"retries": 1, "timeout": 0.1}, r"in 2 tries.*no answer within 0\.1 s", 2),
        (lambda *_: (400, "no seed"), {}, r"refuses: HTTP 400 'no seed'.*request: \{", 1),
        (lambda *_: (200, "<html>"), {}, "not answer as an OpenAI-compatible.*<html>", 1),
        (lambda *_: "well", {}, "no verdict .one number.: 'well'", 1),
        (lambda *_: "well", {"range": [0, 1]}, "one number from 0 to 1", 1),
        (lambda *_: "well", {"choices": {"A": 1, "B": 0}, "marker": "is"},
         "one of A, B behind 'is'", 1),
        (lambda *_: "well", {"request": {}, "retries": 2}, "no verdict", 3),
    ],
    ids=["busy", "slow", "refused", "no API", "no number", "a range", "choices", "it may change"],
)  # fmt: skip
def test_no_verdict_stops_in_words(answer, settings, words, requests):
    with judging(answer) as judge:
        with pytest.raises(UserError, match=f"(?s){words}"):
            judged(reward_of(judge=judge.address, **settings), ["a"])
        assert len(judge.requests) == requests


def test_a_wrong_path_and_nobody_there():
    with judging(lambda *_: "1") as judge:
        wrong = judge.address.replace("/v1", "")
        with pytest.raises(UserError, match=r"(?s)HTTP 404.*often it ends in /v1.*'gpt'"):
            judged(reward_of(judge=wrong), ["a"])
        assert judged(reward_of(judge=f"{judge.address}/chat/completions/"), ["a"]) == [1]
    with pytest.raises(UserError, match=r"in 1 try\. The last one: ConnectError"):
        judged(reward_of(judge=judge.address, retries=0), ["a"])


def test_answers_without_a_verdict_can_be_skipped_and_are_counted():
    logged = {}
    with judging(lambda body, number: "1" if "good" in str(body) else "?") as judge:
        reward = reward_of(judge=judge.address, on_unreadable="skip")
        assert judged(reward, ["good", "bad"], log_metric=logged.__setitem__) == [1, None]
    assert logged == {"rewards/judge/unreadable": 0.5}


def test_one_failure_ends_the_others():
    with judging(lambda body, number: (400, "") if number == 1 else slow(body, number)) as judge:
        began = time.monotonic()
        with pytest.raises(UserError):
            judged(reward_of(judge=judge.address, parallel=1), [str(n) for n in range(20)])
        assert time.monotonic() - began < 5 and len(judge.requests) < 4


def test_a_column_that_no_row_has():
    reward = reward_of(prompt="{reply} {anser}")
    with pytest.raises(UserError, match=r"no column 'anser'. Did you mean answer\?"):
        prepare_rewards([reward], {"answer": ["1"], "reference": [None]})
    prepare_rewards([reward], {"anser": ["1"]})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (ASKED | {"judge": "localhost:8000"}, "write the address of the API, such as http://"),
        ({"judge": "http://x/v1", "prompt": "{reply}"}, "judge needs model: write {judge: {model"),
        ({"judge": "http://x/v1", "model": "m"}, "judge needs prompt"),
        (ASKED | {"judge": "http://x/v1", "prompt": "{answer}"}, "write {reply} in it"),
        (ASKED | {"judge": "http://x/v1", "timout": 3}, "no setting 'timout'. Did you mean time"),
        (ASKED | {"judge": "http://x/v1", "range": [3, 1]}, "the lowest and the highest number"),
        (ASKED | {"judge": "http://x/v1", "range": [0, 1], "choices": {"a": 1, "b": 0}}, "either"),
        (ASKED | {"judge": "http://x/v1", "request": {"stream": True}}, "leave out request.stream"),
        (ASKED | {"judge": "http://x/v1", "on_unreadable": "zero"}, "'zero' is not an option"),
        ({"model": "runs/x", "dtype": "float8"}, "'float8' is not an option"),
        ({"model": "runs/x", "prompt": "x"}, "model has no setting 'prompt'"),
        ({"model": {"weight": 1}}, "model needs path"),
    ],
)  # fmt: skip
def test_mistakes_in_words(entry, words):
    (mistake,) = check_rewards([entry])
    assert words in mistake.text


def test_short_and_long_forms_are_the_same():
    judge, model = {"address": "http://x/v1"} | ASKED, {"path": "runs/x", "weight": 2}
    short = [ASKED | {"judge": "http://x/v1"}, {"model": "runs/x", "weight": 2}]
    long = [{"judge": judge}, {"model": model}]
    assert parse_rewards(short) == parse_rewards(long)
    (mistake,) = check_rewards([*short, {"model": "runs/y"}])
    assert "{...: {name: model_2}}" in mistake.text
