"""Rules 1 to 6 on conversations drawn at random, over templates and tokenizers at hand."""

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.conversations import (
    FAMILIES,
    LOOK_UP,
    SPACE,
    TOKENIZERS,
    WORDS,
    all_templates,
    assert_labels,
    bot,
    call,
    pair,
    system,
    tool,
    trl,
    user,
)
from luthier.chat import ChatEncoder, ChatError
from luthier.chat.turns import SharedSequence

TEMPLATES = all_templates()
QUICK = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
# Each family of templates once with every tokenizer; all templates with one tokenizer.
CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</s>",
    "<|end|>",
    "<end_of_turn>",
    "<|eot_id|>",
]
TEXT = st.builds(lambda before, text, after: before + text + after, SPACE, WORDS, SPACE)
SPOKEN = TEXT.filter(lambda text: not any(token in text for token in CONTROL))


@st.composite
def conversations(draw, text=SPOKEN):
    """Turns of user and assistant, perhaps a system prompt, reasoning and tools."""
    messages = [system(draw(text))] if draw(st.booleans()) else []
    tools = None
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(text)))
        kind = draw(st.sampled_from(["plain", "plain", "plain", "reasoning", "tool"]))
        if kind == "tool":
            tools = [LOOK_UP]
            words = draw(st.lists(text, min_size=1, max_size=2))
            messages.append(bot(draw(text), tool_calls=[call(word) for word in words]))
            messages += [tool(draw(text)) for _ in words]
        more = {"reasoning_content": draw(text)} if kind == "reasoning" else {}
        messages.append(bot(draw(text), **more))
    return messages, tools


@functools.cache
def tokenizer_of(tokenizer_name):
    """A tokenizer with the tokens of all the families, as large tokenizers are slow to copy."""
    return pair(tokenizer_name, "\n".join(TEMPLATES[f"chat_templates/{name}"] for name in FAMILIES))


def encoder_of(tokenizer, template):
    try:
        return ChatEncoder(
            tokenizer, TEMPLATES[template], on_lost="keep", empty_replies="train", date=_today()
        )
    except ChatError as error:
        return error


def _texts(value):
    """Every text inside a message."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in _texts(item)]


def _today():
    from datetime import date

    return date.today().isoformat()


def check_rules(tokenizer, encoder, messages, tools, sanitize=False, kwargs=None):
    """Rules 1 to 5 for one row; gives back whether the row could be encoded."""
    written = "".join(text for message in messages for text in _texts(message))
    if not sanitize and any(token in written for token in tokenizer.added_tokens_encoder):
        return False
    try:
        sequences = encoder.encode(messages, tools, kwargs)
    except ChatError as error:
        assert error.reason in {"template refuses", "no stop token", "no prefix", "lost"}, error
        return False
    for sequence in sequences:
        ids = sequence.input_ids
        assert_labels(sequence)
        for message, start, stop in sequence.replies:
            prompt = tokenizer.apply_chat_template(
                encoder.convert_arguments(messages[:message], tools),
                tools=tools,
                chat_template=encoder.settings()["template"],
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=sanitize,
                **kwargs or {},
            )
            assert ids[:start] == prompt
            assert encoder.prompt(messages[:message], tools, kwargs) == prompt
            assert ids[stop - 1] in tokenizer.added_tokens_decoder
        bos = tokenizer.bos_token_id
        assert ids[:2].count(bos) <= 1
    trained = sorted(message for sequence in sequences for message in sequence.messages)
    assert trained == [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return True


@pytest.mark.parametrize("template", [f"chat_templates/{name}" for name in FAMILIES])
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_rules_for_every_tokenizer(tokenizer_name, template):
    tokenizer = tokenizer_of(tokenizer_name)
    encoder = encoder_of(tokenizer, template)

    @QUICK
    @given(conversations())
    def check(row):
        check_rules(tokenizer, encoder, *row)

    check()


@pytest.mark.parametrize("template", TEMPLATES)
def test_rules_for_every_template(template):
    tokenizer = pair("llama3-words", TEMPLATES[template])
    encoder = encoder_of(tokenizer, template)
    if isinstance(encoder, ChatError):
        assert encoder.reason == "bad template"
        return

    @settings(QUICK, max_examples=3)
    @given(conversations())
    def check(row):
        check_rules(tokenizer, encoder, *row)

    check()


FLAG = st.booleans()
KWARGS = {
    "qwen3": st.fixed_dictionaries({"enable_thinking": FLAG}),
    "qwen3_5_think": st.fixed_dictionaries({"enable_thinking": FLAG}),
    "qwen3_6": st.fixed_dictionaries({"enable_thinking": FLAG, "preserve_thinking": FLAG}),
    "gptoss": st.fixed_dictionaries({"reasoning_effort": st.sampled_from(["low", "high"]) | WORDS}),
}


@pytest.mark.parametrize("template", KWARGS)
def test_rules_for_rows_with_variables_of_their_own(template):
    """One encoder for rows of every value, with and without tools."""
    source = trl(template)
    tokenizer = pair("llama3-words", source)
    encoder = ChatEncoder(tokenizer, source, on_lost="keep", empty_replies="train", date=_today())

    @settings(QUICK, max_examples=15)
    @given(conversations(), KWARGS[template])
    def check(row, kwargs):
        # A value is text of the template: transformers makes tokens of it, and a row may not.
        if not encoder.holds_control_tokens(map(str, kwargs.values())):
            check_rules(tokenizer, encoder, *row, kwargs=kwargs)

    check()


@pytest.mark.parametrize("template", ["qwen2_5", "llama3", "gemma3", "phi3", "cohere"])
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS[:3])
def test_control_tokens_in_questions_become_text(tokenizer_name, template):
    tokenizer = pair(tokenizer_name, trl(template))
    encoder = ChatEncoder(tokenizer, empty_replies="train", date=_today())
    tokens = [token for token in tokenizer.all_special_tokens if token != "<unk>"]
    tokens += [token for token in CONTROL if token in encoder._pipelines.default.controls.tokens]

    @QUICK
    @given(st.lists(st.sampled_from(tokens) | WORDS, min_size=1, max_size=5), WORDS)
    def check(parts, reply):
        messages = [user("q" + "".join(parts)), bot("a" + reply), user("".join(parts)), bot("b")]
        if any(token in messages[1]["content"] for token in tokens):
            return
        prompts = [encoder.prompt(messages[:1]), encoder.prompt(messages[:3])]
        plain = encoder.prompt([user("q"), bot("a"), user("c")])
        for token in tokens:
            index = tokenizer.added_tokens_encoder[token]
            assert prompts[1].count(index) == plain.count(index)
        check_rules(tokenizer, encoder, messages, None, sanitize=True)

    check()


@pytest.mark.parametrize(
    "template", ["qwen2_5", "qwen3", "llama3", "gemma3", "lfm2", "nemotron_3_nano", "gptoss"]
)
def test_one_render_gives_what_many_give(template, monkeypatch):
    """The proof's shortcut and the way without it agree to the last id."""
    tokenizer = pair("gpt2-words", trl(template))
    encoder = ChatEncoder(tokenizer, on_lost="keep", empty_replies="train", date="2025-01-02")
    shared = SharedSequence.sequence

    @settings(QUICK, max_examples=12)
    @given(conversations())
    def check(row):
        found = []
        for method in (shared, lambda *_: None):
            monkeypatch.setattr(SharedSequence, "sequence", method)
            try:
                found.append([(s.input_ids, s.labels) for s in encoder.encode(*row)])
            except ChatError as error:
                found.append(error.reason)
        assert found[0] == found[1]

    check()


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_a_batch_gives_what_its_rows_give(tokenizer_name):
    """Batching, taking text apart at control tokens and the cache change no id."""
    tokenizer = pair(tokenizer_name, trl("qwen2_5"))
    encoder = ChatEncoder(tokenizer, on_lost="keep", empty_replies="train")
    rows = [
        [user(f"q{n % 3}\n"), bot(f" a{n}\n\n"), user("\nq"), bot(f"{'1' * n} <b> é{n}")]
        for n in range(12)
    ]
    batch = encoder.encode_batch([{"messages": row} for row in rows])
    for row, sequences in zip(rows, batch.rows, strict=True):
        alone = ChatEncoder(tokenizer, on_lost="keep", empty_replies="train").encode(row)
        assert [s.input_ids for s in sequences] == [s.input_ids for s in alone]
        assert [s.labels for s in sequences] == [s.labels for s in alone]


def test_header_tokens_that_take_white_space():
    """Phi-3's role tokens take the white space behind them: the ids are still a server's."""
    tokenizer = pair("sentencepiece", trl("phi3"), rstrip=True)
    encoder = ChatEncoder(tokenizer, empty_replies="train")
    for reply in ("a", "\na", "\n\n  a\n", " a"):
        assert check_rules(
            tokenizer, encoder, [user("\nq"), bot(reply), user("r "), bot("b")], None
        )
