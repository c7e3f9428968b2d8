"""Replies that are written side by side (`luthier serve --batch`) are those written one by one."""

import json
import threading
import urllib.error

import pytest

pytest.importorskip("starlette")
from helpers.model_server import CHAT, listening, post, stream_events
from luthier.errors import UserError
from luthier.infer.batch_writer import check_batch_settings

QUESTIONS = [[{"role": "user", "content": "abc" * (number + 1)}] for number in range(6)]


@pytest.fixture(scope="module")
def port(tuned_llm):
    with listening(tuned_llm, batch=4) as port:
        yield port


def content(answer):
    return json.loads(answer)["choices"][0]["message"]["content"]


def test_replies_side_by_side_are_those_one_by_one(tuned_llm, port):
    expected = [reply.text for reply in tuned_llm.replies(QUESTIONS, max_new_tokens=9)]
    answers = {}

    def ask(number):
        body = {"messages": QUESTIONS[number], "max_tokens": 9, "temperature": 0}
        answers[number] = content(post(port, body))

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(QUESTIONS))]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [answers[number] for number in range(len(QUESTIONS))] == expected


def test_a_stream_and_a_stop_string(tuned_llm, port):
    (reply,) = tuned_llm.replies([QUESTIONS[0]], max_new_tokens=9)
    body = {"messages": QUESTIONS[0], "max_tokens": 9}
    events, is_complete = stream_events(post(port, body | {"stream": True}))
    assert is_complete
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == reply.text
    stop = reply.text[2:4]
    stopped = content(post(port, body | {"stop": [stop]}))
    assert stopped == reply.text[: reply.text.index(stop)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        pytest.param({"temperature": 0.7}, "temperature", id="temperature"),
        pytest.param({"top_p": 0.5}, "temperature", id="top_p"),
        pytest.param({"seed": 1}, "seed", id="seed"),
        pytest.param({"logit_bias": {"5": 1.0}}, "logit_bias", id="logit_bias"),
    ],
)
def test_what_needs_a_reply_of_its_own_is_refused(port, fields, param):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(port, {"messages": QUESTIONS[0], "max_tokens": 2} | fields, CHAT)
    error = json.loads(refused.value.read())["error"]
    assert (refused.value.code, error["param"]) == (400, param)
    assert "side by side (--batch), where replies are greedy" in error["message"]


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"repetition_penalty": 1.1}])
def test_settings_of_the_command_that_draw_or_weigh_are_refused(settings):
    with pytest.raises(UserError, match="with --batch all replies are greedy"):
        check_batch_settings(settings)
    check_batch_settings({"max_new_tokens": 9})
