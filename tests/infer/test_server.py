"""The server's replies, whole and as streams, and what stops, bounds and refuses them."""

import json
import socket
import threading
import time
import urllib.error

import pytest

pytest.importorskip("starlette")
from helpers import adapter_runs
from helpers.model_server import (
    CHAT,
    COMPLETIONS,
    QUESTION,
    RESPONSES,
    app_client,
    listening,
    post,
    send_and_leave,
    stream_events,
)
from luthier.errors import UserError
from luthier.infer import LLM
from luthier.infer.generate import bytes_per_row
from luthier.infer.server import ModelServer, ServerLimits
from luthier.infer.stream import StopStrings


@pytest.fixture(scope="module")
def client(tuned_llm):
    with app_client(tuned_llm) as client:
        yield client


@pytest.fixture
def expected(tuned_llm):
    (reply,) = tuned_llm.replies([QUESTION], max_new_tokens=9)
    return reply


def test_a_chat_completion_is_what_the_model_replies(client, expected):
    body = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 9, "model": "tiny"}).json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert (choice["finish_reason"], body["model"]) == ("length", "tiny")
    counts = {"prompt_tokens": expected.prompt_tokens, "completion_tokens": 9}
    assert body["usage"] == counts | {"total_tokens": expected.prompt_tokens + 9}


def test_a_stream_is_the_same_text_with_its_counts_and_its_end(client, expected):
    question = {"messages": QUESTION, "max_tokens": 9, "stream": True}
    answer = client.post(CHAT, json=question | {"stream_options": {"include_usage": True}})
    events, is_complete = stream_events(answer.text)
    assert is_complete
    *chunks, last, usage = events
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == expected.text
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 9
    events, is_complete = stream_events(client.post(CHAT, json=question).text)
    assert is_complete and not any("usage" in event for event in events)


def test_a_response_streams_what_it_is_whole(client, expected):
    question = {"input": "abc", "max_output_tokens": 9, "model": "tiny"}
    whole = client.post(RESPONSES, json=question).json()
    assert whole["output"][0]["content"][0]["text"] == expected.text
    assert (whole["status"], whole["incomplete_details"]["reason"]) == (
        "incomplete", "max_output_tokens",
    )  # fmt: skip
    events, is_complete = stream_events(
        client.post(RESPONSES, json=question | {"stream": True}).text
    )
    assert is_complete
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == expected.text
    assert events[0]["response"]["output"] == []
    assert events[-1]["type"] == "response.incomplete"
    output, streamed = whole["output"][0], events[-1]["response"]["output"][0]
    assert streamed | {"id": 0} == output | {"id": 0}


def test_a_completion_goes_on_with_plain_text(client, tuned_llm):
    body = {"prompt": "a<|im_end|>", "max_tokens": 5}
    answer = client.post(COMPLETIONS, json=body).json()
    # The control token is eleven bytes of text, and no token.
    assert answer["usage"]["prompt_tokens"] == 1 + len("a<|im_end|>") - 1
    events, is_complete = stream_events(client.post(COMPLETIONS, json=body | {"stream": True}).text)
    text = "".join(event["choices"][0]["text"] for event in events)
    assert is_complete and text == answer["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_the_reply_in_front_of_it(client, expected, stream):
    stop = expected.text[3:5]
    body = {"messages": QUESTION, "max_tokens": 9, "stop": [stop, "never"], "stream": stream}
    answer = client.post(CHAT, json=body)
    if stream:
        events, _ = stream_events(answer.text)
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == (expected.text.partition(stop)[0], "stop")


def test_a_reply_ends_where_the_context_does(client):
    body = {"messages": QUESTION, "max_tokens": 10**9, "logit_bias": {"0": -100, "2": -100}}
    answer = client.post(CHAT, json=body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == adapter_runs.CONTEXT


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 200}]}),
        (COMPLETIONS, {"prompt": "x" * 200}),
        (RESPONSES, {"input": "x" * 200}),
    ],
    ids=["chat", "completions", "responses"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_beyond_the_context_is_refused_on_every_route(client, path, body, stream):
    answer = client.post(path, json=body | {"stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "and the model reads 128 with its reply" in error["message"]


SAID = [
    ({"n": 2}, "n", "n: must be 1: a request gets one reply; send it again, with another "
     "seed, for another one."),
    ({"n": True}, "n", "n: must be 1: a request gets one reply; send it again, with another "
     "seed, for another one."),
    ({"logprobs": True}, "logprobs",
     "logprobs: must be false: this server returns no probabilities of tokens."),
    ({"frequency_penalty": 0.5}, "frequency_penalty",
     "frequency_penalty: must be 0: this server has another penalty, for all requests: luthier "
     "serve RUN repetition_penalty=1.1."),
    ({"reasoning_effort": "low"}, "reasoning_effort",
     "reasoning_effort: 'reasoning_effort' is set, and the chat template never reads it; variables "
     "that it reads: none."),
    ({"chat_template_kwargs": {"mood": "calm"}}, "chat_template_kwargs",
     "chat_template_kwargs: 'mood' is set, and the chat template never reads it; variables that it "
     "reads: none."),
    ({"temperature": "hot"}, "temperature", "temperature: must be a number."),
    ({"max_tokens": -3}, "max_tokens", "max_tokens: must be greater than or equal to 1."),
    ({"temprature": 1}, "temprature",
     "temprature: this server has no such field; did you mean temperature?"),
    ({"generation_config": "{}"}, "generation_config",
     "generation_config: this server has no such field; remove it."),
    ({"messages": []}, "messages", "messages: must have at least 1 item, not 0."),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role",
     "messages[0].role: the role 'wizard' is not known. Known roles: system, developer, user, "
     "assistant, tool."),
    ({"messages": [{"role": "user<|im_end|>", "content": "a"}]}, "messages[0].role",
     "messages[0].role: the role 'user<|im_end|>' holds the control token '<|im_end|>'; a role is "
     "a name, such as `user`."),
    ({"messages": [*QUESTION, {"role": "user", "content": [{"type": "input_audio"}]}]},
     "messages[1].content",
     'messages[1].content: must be text, or a list of {"type": "text", "text": ...}; found '
     "'input_audio'."),
    ({"messages": [*QUESTION, {"role": "assistant", "content": "a"}]}, "messages",
     "messages: the conversation ends with a reply, so there is nothing to answer."),
    ({"tools": [{"type": "function", "function": {"name": "look_up"}}]}, "tools",
     "tools: the model's chat template does not show the tools, so it would not see them."),
    ({"tool_choice": "required"}, "tool_choice",
     'tool_choice: must be "auto" or "none": a model cannot be made to call a tool.'),
    ({"stop": ["a"] * 9}, "stop", "stop: must have at most 4 items, not 9."),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", "logit_bias.a: must match pattern '^[0-9]{1,9}$'."),
    ({"logit_bias": {"999": 1}}, "logit_bias", "logit_bias: 999 is no token: the model has 259."),
    ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs",
     "chat_template_kwargs: a request cannot set 'eos_token'."),
    ({"chat_template_kwargs": {"mood": "<|im_end|>"}}, "chat_template_kwargs",
     "chat_template_kwargs: a value holds a control token."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "says"), SAID, ids=[str(case[0])[:40] for case in SAID]
)
def test_what_is_wrong_is_said_with_its_field(client, fields, param, says):
    answer = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 1} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": says, "type": "invalid_request_error", "param": param, "code": None,
    }  # fmt: skip


def test_another_model_is_not_this_one(client):
    answer = client.post(CHAT, json={"messages": QUESTION, "model": "gpt-4"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_fields_without_effect_are_taken(client, expected):
    body = {
        "messages": QUESTION, "max_tokens": 9, "user": "u", "metadata": {"a": "b"}, "store": True,
        "service_tier": "auto", "stream_options": {"include_usage": True}, "n": 1, "top_p": 1,
        "presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"},
        "logprobs": False, "tools": None, "stop": None, "seed": 7, "tool_choice": "none",
    }  # fmt: skip
    answer = client.post(CHAT, json=body)
    assert answer.json()["choices"][0]["message"]["content"] == expected.text


def test_a_tool_of_an_agent_framework_may_be_strict(thinking_client):
    function = {"name": "add", "strict": True, "parameters": {"type": "object", "properties": {}}}
    body = {"messages": QUESTION, "max_tokens": 2}
    for path, tool in (
        (CHAT, {"type": "function", "function": function}),
        (RESPONSES, {"type": "function", **function}),
    ):
        fields = {"input": "abc"} if path == RESPONSES else body
        answer = thinking_client.post(path, json=fields | {"tools": [tool]})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({"Authorization": "Bearer secret"}, 200, id="the key"),
        pytest.param({"Authorization": "Bearer other"}, 401, id="another key"),
        pytest.param({"Authorization": "secret"}, 401, id="no bearer"),
        pytest.param({}, 401, id="no key"),
    ],
)
def test_a_server_with_a_key_answers_who_sends_it(tuned_llm, headers, status):
    with app_client(tuned_llm, key="secret") as client:
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200


def test_a_web_page_of_an_allowed_origin_may_ask(tuned_llm):
    page = "http://localhost:3000"
    question = {"Origin": page, "Access-Control-Request-Method": "POST"}
    with app_client(tuned_llm, key="secret", origins=(page,)) as client:
        answer = client.options(CHAT, headers=question)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        other = client.options(CHAT, headers=question | {"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    with app_client(tuned_llm) as client:
        assert client.options(CHAT, headers=question).status_code == 405


def test_a_temperature_samples_and_a_seed_repeats_it(client, expected):
    def ask(**fields):
        body = {"messages": QUESTION, "max_tokens": 9} | fields
        return client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]

    assert len({ask(temperature=3.0, seed=seed) for seed in range(4)}) > 1
    assert ask(temperature=3.0, seed=5) == ask(temperature=3.0, seed=5)
    assert ask(temperature=0) == ask(temperature=1e-300) == expected.text


def test_the_commands_settings_hold_where_a_request_says_nothing(tuned_llm, expected):
    with app_client(tuned_llm, {"max_new_tokens": 3, "temperature": 3.0}) as client:
        answer = client.post(CHAT, json={"messages": QUESTION}).json()
        assert answer["usage"]["completion_tokens"] <= 3
        body = {"messages": QUESTION, "max_tokens": 9, "temperature": 0}
        text = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
        assert text == expected.text
    with pytest.raises(UserError, match="num_beams=4: the server writes one reply; remove it"):
        ModelServer(tuned_llm, "tiny", {"num_beams": 4}, ServerLimits())


@pytest.mark.parametrize(
    ("bound", "allowed", "host", "status"),
    [
        ("localhost", (), "localhost:8000", 200),
        ("localhost", (), "LOCALHOST.", 200),
        ("localhost", (), "127.0.0.1:8000", 200),
        ("localhost", (), "[::1]:8000", 200),
        ("localhost", (), "192.168.0.7", 403),
        ("localhost", ("gpu.example",), "gpu.example:80", 200),
        ("192.168.0.7", (), "192.168.0.7:8000", 200),
        ("192.168.0.7", (), "192.168.0.8", 403),
        ("0.0.0.0", (), "192.168.0.7", 200),
        ("0.0.0.0", (), "gpu.example", 403),
    ],
)
def test_the_host_is_one_of_this_server(tuned_llm, bound, allowed, host, status):
    with app_client(tuned_llm, host=bound, hosts=allowed) as client:
        assert client.get("/health", headers={"Host": host}).status_code == status


# What a template writes for reasoning and calls, which the model is made to write.

LOOK_UP = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}
CALL_TEXT = '<tool_call>\n{"name": "look_up", "arguments": {"word": "ä"}}\n</tool_call>'
CALLING = f"<think>\nhm\n</think>\n\nWell.\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>"
BROKEN = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "look_up", "argu\n</tool_call>'
TOOL_QUESTION = {"messages": QUESTION, "tools": [LOOK_UP]}


@pytest.fixture(scope="module")
def thinking_client(thinker):
    with app_client(thinker) as client:
        yield client


def test_reasoning_and_calls_are_fields_of_their_own(thinking_client, forced):
    forced(CALLING)
    (choice,) = thinking_client.post(CHAT, json=TOOL_QUESTION).json()["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and "parse_error" not in choice
    assert (message["content"], message["reasoning_content"]) == ("Well.", "hm")
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"name": "look_up", "arguments": '{"word": "ä"}'}] * 2
    response_tool = {"type": "function", **LOOK_UP["function"]}
    body = {"input": "abc", "tools": [response_tool]}
    whole = thinking_client.post(RESPONSES, json=body).json()
    assert [item["type"] for item in whole["output"]] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip


def test_calls_stream_with_their_index_and_arguments(thinking_client, forced):
    forced(CALLING)
    body = TOOL_QUESTION | {"stream": True}
    events, is_complete = stream_events(thinking_client.post(CHAT, json=body).text)
    assert is_complete
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Well."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 0, 1, 1]
    assert calls[0]["function"] == {"name": "look_up", "arguments": ""}
    assert calls[1] == {"index": 0, "function": {"arguments": '{"word": "ä"}'}}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_does_not_parse_is_content_with_the_reason(thinking_client, forced, stream):
    forced(f"{BROKEN}<|im_end|>")
    answer = thinking_client.post(CHAT, json=TOOL_QUESTION | {"stream": stream})
    if stream:
        events, _ = stream_events(answer.text)
        deltas = [event["choices"][0]["delta"] for event in events]
        # What was sent as reasoning stays that; all behind it is content.
        text = "".join(delta.get("content", "") for delta in deltas)
        assert '"argu' in text and "hm" not in text
        choice = events[-1]["choices"][0]
    else:
        (choice,) = answer.json()["choices"]
        assert choice["message"] == {"role": "assistant", "content": BROKEN, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["parse_error"].startswith("the calls of the reply cannot be read")


def test_a_stop_string_within_the_content_leaves_a_message(thinking_client, forced):
    forced(CALLING)
    body = TOOL_QUESTION | {"stop": ["ll."]}
    (choice,) = thinking_client.post(CHAT, json=body).json()["choices"]
    assert choice["message"]["content"] == "We" and choice["message"]["reasoning_content"] == "hm"
    assert choice["finish_reason"] == "stop" and "parse_error" not in choice


def test_tool_choice_none_shows_no_tools(thinking_client, forced):
    forced("<think>\n\n</think>\n\nWell.<|im_end|>")

    def count(**fields):
        body = TOOL_QUESTION | fields
        return thinking_client.post(CHAT, json=body).json()["usage"]["prompt_tokens"]

    assert count() == count(tool_choice="auto") > count(tool_choice="none") == count(tools=None)


EFFORT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ reasoning_effort }} {{ mood }}\n"
    "{% endif %}"
)


def test_variables_of_a_request_are_in_its_prompt(tmp_path):
    folder = adapter_runs.base(tmp_path / "effort")
    (folder / "chat_template.jinja").write_text(EFFORT, encoding="utf-8")
    low = {"reasoning_effort": "low"}
    rows = [
        (CHAT, low, low),
        (CHAT, {"chat_template_kwargs": low | {"mood": "calm"}}, low | {"mood": "calm"}),
        (CHAT, low | {"chat_template_kwargs": {"mood": "calm"}}, low | {"mood": "calm"}),
        (RESPONSES, {"reasoning": {"effort": "low"}}, low),
        (CHAT, {}, None),
    ]
    with LLM(str(folder)) as llm, app_client(llm) as client:
        prompts = [
            {"messages": QUESTION, "chat_template_kwargs": variables} for _, _, variables in rows
        ]
        expected = llm.prompt_ids(prompts)
        assert len({*map(len, expected)}) == 3
        for (path, fields, _), ids in zip(rows, expected, strict=True):
            length = {"max_tokens": 1, "messages": QUESTION}
            if path == RESPONSES:
                length = {"max_output_tokens": 1, "input": QUESTION}
            usage = client.post(path, json=length | fields).json()["usage"]
            assert usage.get("prompt_tokens", usage.get("input_tokens")) == len(ids), fields


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted", "rest"),
    [
        (["end"], ["a", "en", "d", "x"], ["a", "", "", ""], ""),
        (["end"], ["a", "en", "x"], ["a", "", "enx"], ""),
        (["end"], ["a", "en"], ["a", ""], "en"),
        (["aab"], ["aaa", "b"], ["a", ""], ""),
        (["b", "abc"], ["xab"], ["xa"], ""),
        ([], ["ab"], ["ab"], ""),
    ],
)
def test_a_possible_stop_is_held_back(stops, pieces, emitted, rest):
    text = StopStrings(stops)
    told = []
    for piece in pieces:
        told.append("" if text.is_complete else text.add(piece))
    assert (told, text.rest()) == (emitted, rest)


# A real server, and clients that come and go.


@pytest.fixture(scope="module")
def long_llm(tmp_path_factory):
    """A model that can write for a long time."""
    folder = adapter_runs.base(tmp_path_factory.mktemp("long"), max_position_embeddings=20_000)
    with LLM(str(folder)) as llm:
        yield llm


ENDLESS = {
    "messages": QUESTION, "max_tokens": 19_000, "logit_bias": {"0": -100, "2": -100},
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_stops_its_reply(long_llm, stream):
    with listening(long_llm) as port:
        # One is being written, and nine wait behind it, when all of them leave.
        clients = [
            threading.Thread(target=send_and_leave, args=(port, ENDLESS | {"stream": stream}, 1.0))
            for _ in range(10)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        began = time.monotonic()
        answer = json.loads(post(port, {"messages": QUESTION, "max_tokens": 2}))
        assert answer["usage"]["completion_tokens"] == 2
        # All of them together would take minutes.
        assert time.monotonic() - began < 10


def test_more_than_may_wait_are_refused(long_llm):
    with listening(long_llm, waiting=1) as port:
        clients = [
            threading.Thread(target=send_and_leave, args=(port, ENDLESS, 3.0)) for _ in range(2)
        ]
        for client in clients:
            client.start()
        time.sleep(1.5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(port, {"messages": QUESTION})
        for client in clients:
            client.join()
    assert refused.value.code == 503
    error = json.loads(refused.value.read())["error"]
    assert error["code"] == "overloaded"
    assert "2 requests are being answered or wait" in error["message"]
    assert refused.value.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_reply_that_takes_too_long_is_stopped(long_llm, stream):
    with app_client(long_llm, reply_seconds=1) as client:
        answer = client.post(CHAT, json=ENDLESS | {"stream": stream})
        if stream:
            events, is_complete = stream_events(answer.text)
            assert is_complete
            error = events[-1]["error"]
        else:
            assert answer.status_code == 504
            error = answer.json()["error"]
        assert error["message"] == "The reply was not complete within 1 s, and was stopped."
        assert client.post(CHAT, json={"messages": QUESTION, "max_tokens": 1}).status_code == 200


def test_a_server_that_ends_ends_its_replies(long_llm, capfd):
    answers, begun = [], threading.Event()

    def ask(stream):
        try:
            answers.append((200, post(port, ENDLESS | {"stream": stream}, begun=begun)))
        except urllib.error.HTTPError as error:
            answers.append((error.code, error.read().decode()))

    with listening(long_llm) as port:
        clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        clients[0].start()
        assert begun.wait(30)  # One reply is written at a time: the other waits behind it.
        clients[1].start()
        time.sleep(1)
        began = time.monotonic()
    for client in clients:
        client.join()
    assert time.monotonic() - began < 3
    answers.sort()
    assert [code for code, _ in answers] == [200, 503]
    assert stream_events(answers[0][1])[0][-1]["error"]["code"] == "shutting_down"
    assert json.loads(answers[1][1])["error"]["message"] == "The server is shutting down."
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and "ERROR" not in out + err


def test_openais_own_client_understands_it(tuned_llm, expected):
    openai = pytest.importorskip("openai")
    with listening(tuned_llm) as port:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["tiny"]
        question = {"model": "tiny", "messages": QUESTION, "max_tokens": 9}
        reply = client.chat.completions.create(**question)
        assert reply.choices[0].message.content == expected.text
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(**question, stream=True, stream_options=options)
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert (text, chunks[-1].usage.completion_tokens) == (expected.text, 9)
        answer = client.responses.create(model="tiny", input="abc", max_output_tokens=9)
        assert answer.output_text == expected.text
        # The client has no final response where the longest length ended it.
        with client.responses.stream(model="tiny", input="abc", max_output_tokens=99) as stream:
            streamed = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            assert stream.get_final_response().output_text == streamed
        assert streamed.startswith(expected.text)
        assert client.completions.create(model="tiny", prompt="abc", max_tokens=2).choices[0].text
        with pytest.raises(openai.BadRequestError, match="n: must be 1") as refused:
            client.chat.completions.create(**question, n=2)
        assert (refused.value.param, refused.value.type) == ("n", "invalid_request_error")
        with pytest.raises(openai.NotFoundError, match="This server has `tiny`"):
            client.chat.completions.create(model="gpt-4", messages=QUESTION)


def test_openais_own_client_streams_calls(thinker, forced):
    openai = pytest.importorskip("openai")
    forced(CALLING)
    with listening(thinker) as port:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
        question = TOOL_QUESTION | {"model": "tiny"}
        with client.chat.completions.stream(**question) as stream:
            events = list(stream)
            message = stream.get_final_completion().choices[0].message
        whole = client.chat.completions.create(**question).choices[0]
        functions = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        assert functions == [("look_up", '{"word": "ä"}')] * 2
        assert functions == [
            (c.function.name, c.function.arguments) for c in whole.message.tool_calls
        ]
        assert (whole.finish_reason, whole.message.reasoning_content) == ("tool_calls", "hm")
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        assert [event.index for event in done] == [0, 1]
        # The calls and their results go back as the client has them.
        forced("<think>\nso\n</think>\n\nDone.<|im_end|>")
        results = [
            {"role": "tool", "tool_call_id": c.id, "content": "1"} for c in message.tool_calls
        ]
        messages = [*QUESTION, whole.message.model_dump(exclude_none=True), *results]
        last = client.chat.completions.create(**question | {"messages": messages}).choices[0]
        assert (last.message.content, last.finish_reason) == ("Done.", "stop")


def test_many_clients_each_get_their_reply(tuned_llm):
    texts = ["abc", "hello there", "x", "a longer question than the others"]
    expected = tuned_llm.generate(texts, max_new_tokens=9)
    replies = {}

    def ask(client):
        for round_ in range(3):
            number = (client + round_) % len(texts)
            question = [{"role": "user", "content": texts[number]}]
            body = {"messages": question, "max_tokens": 9}
            answer = json.loads(post(port, body))["choices"][0]["message"]["content"]
            replies[client, round_] = answer == expected[number]

    with listening(tuned_llm) as port:
        clients = [threading.Thread(target=ask, args=(client,)) for client in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert len(replies) == 24 and all(replies.values())


HALF = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


@pytest.mark.parametrize(
    "sent",
    [
        HALF + b"Content-Length: 500\r\n\r\n{",
        HALF + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HALF + b"Content-Length: -1\r\n\r\n",
        HALF[:40],
        b"\x1b[2J GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    ],
    ids=["cut", "chunks", "length", "head", "garbage", "tls", "no host", "two hosts"],
)
def test_a_request_that_is_cut_leaves_no_traceback(tuned_llm, capfd, sent):
    with listening(tuned_llm) as port:
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(sent)
            time.sleep(0.1)
        assert json.loads(post(port, {"messages": QUESTION, "max_tokens": 1}))["choices"]
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and "\x1b" not in out + err


def test_a_body_that_never_comes_is_not_waited_for(tuned_llm, monkeypatch):
    monkeypatch.setattr("luthier.infer.server._BODY_SECONDS", 0.3)
    with (
        listening(tuned_llm, waiting=1) as port,
        socket.create_connection(("localhost", port)) as connection,
    ):
        connection.sendall(HALF + b"Content-Length: 500\r\n\r\n{")
        # The head and the body may come in two pieces.
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b"not complete after 0 seconds" in answer


def test_the_memory_bounds_a_reply(tuned_llm, client, monkeypatch):
    row = bytes_per_row(tuned_llm.model, 22, 5)

    def ask(free):
        monkeypatch.setattr("luthier.infer.reply_writer.free_memory", lambda _: (free, "cpu"))
        return client.post(CHAT, json={"messages": QUESTION, "max_tokens": 50})

    answer = ask(row / 0.8 + 1).json()
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"
    refused = ask(1000)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "messages: a prompt of 22 tokens does not fit into the memory that is free. Shorten it."
    )
