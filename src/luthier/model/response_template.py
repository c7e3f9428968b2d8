"""The `response_template` of a tokenizer: how transformers reads replies as messages.

transformers 5.13 and later take a reply apart by it (`tokenizer.parse_response`), its server too.
It is made of what the chat template writes around the fields of a reply, and counts only where it
reads made-up replies as `ChatEncoder.parse` does.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from luthier.chat import ChatEncoder, ChatError
from luthier.chat.reply_grammar import ReplyGrammar, ReplyNode

_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string", "description": "The word."},
                "count": {"type": "integer", "description": "How many."},
                "options": {"type": "object", "description": "More."},
            },
            "required": ["word"],
        },
    },
}
_CALL_IDS = ("call00001", "call00002")
_CONTENTS = ("Well.", "Two lines,\n\nand «signs»: <b> {x} [1] \"'.", " At its edges \n")
_REASONING = ("Let me see.", "One.\n\nTwo: {} <i>.")
_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"word": "lute"},
    {"word": 'a "b"\nc ä', "count": 3, "options": {"deep": [1, None, True]}},
    {},
)


def choose_response_template(tokenizer: Any, encoder: ChatEncoder) -> dict[str, Any] | None:
    """Return the response template to save with a tokenizer whose chat template is the encoder's.

    The tokenizer's own one where it reads replies as `ChatEncoder.parse` does, else one that is
    made and does; None where neither does.
    """
    # Whatever the training leaves out, servers see.
    changes = {"max_length": None, "on_lost": "keep", "empty_replies": "train", "train_on": "last"}
    encoder = encoder.with_settings(changes)
    try:
        own, made = getattr(tokenizer, "response_template", None), make_response_template(encoder)
        for template, is_exact in ((own, False), (made, True)):
            if template is not None and find_disagreement(template, encoder, is_exact) is None:
                return dict(template)
    except Exception as error:  # templates raise anything, and a trained model is to be saved
        warnings.warn(f"no response_template is saved: {error!r}", stacklevel=2)
    return None


def find_disagreement(template: Any, encoder: ChatEncoder, is_exact: bool = False) -> str | None:
    """Return a reply that a response template reads otherwise than `ChatEncoder.parse`.

    None where it reads all made-up replies alike; templates that transformers refuses differ.
    `is_exact`: whether white space at the edges of texts counts; most makers' templates strip it.
    """
    count, tools = 0, _shown_tools(encoder)
    for messages, message in _make_replies():
        probe = _encode_reply(encoder, messages, message, tools)
        if probe is None:
            continue
        prompt, ids = probe
        parsed = encoder.parse(ids, messages, tools)
        if parsed.reason is not None:
            continue
        count += 1
        problem = compare_reading(template, encoder, prompt, ids, parsed.message, tools, is_exact)
        if problem is not None:
            return problem
    return None if count else "the chat template writes no reply that can be compared"


def compare_reading(
    template: Any,
    encoder: ChatEncoder,
    prompt: list[int],
    reply: list[int],
    message: dict[str, Any],
    tools: list | None,
    is_exact: bool = False,
) -> str | None:
    """Return how a response template reads a reply otherwise than as a message; None if alike.

    `is_exact`: whether white space at the edges of texts counts.
    """
    from transformers.utils.chat_parsing import parse_response

    text, prefix = encoder.decode_reply(reply), encoder.tokenizer.decode(prompt)
    normalize = partial(_normalize_message, is_exact=is_exact)
    try:
        read = normalize(parse_response(text, template, prefix=prefix, tools=tools))
    # What transformers raises for a template of another form, and its parsers of values.
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        return f"{text!r} cannot be read by it: {error}"
    expected = normalize(message)
    wrong = next((name for name in expected if read[name] != expected[name]), None)
    if wrong is None:
        return None
    return f"{text!r}: its {wrong} is {expected[wrong]!r}, and reads as {read[wrong]!r}"


def _normalize_message(message: Any, is_exact: bool) -> dict[str, Any]:
    """Return what counts in a message when two are compared: texts, and calls without their ids."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    names = ("reasoning_content", "reasoning", "thinking")
    texts = {
        "content": message.get("content") or "",
        "reasoning_content": next((message[n] for n in names if message.get(n)), ""),
    }
    return {
        **(texts if is_exact else {name: text.strip() for name, text in texts.items()}),
        "tool_calls": [
            (call.get("name"), _read_arguments(call.get("arguments"))) for call in calls
        ],
    }


def _read_arguments(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _shown_tools(encoder: ChatEncoder) -> list | None:
    """Return a made-up tool; None where the template refuses it."""
    try:
        encoder.prompt([{"role": "user", "content": "What is a lute?"}], [_TOOL])
    except ChatError:
        return None
    return [_TOOL]


def _make_replies() -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Yield conversations and replies to them, with every combination of fields."""
    question = {"role": "user", "content": "What is a lute?"}
    call = _make_calls([{"word": "lute"}])
    result = {"role": "tool", "name": "look_up", "tool_call_id": _CALL_IDS[0], "content": "42"}
    prompts: tuple[list[dict[str, Any]], ...] = (
        [question],
        [question, {"role": "assistant", "content": "", "tool_calls": call}, result],
    )
    fields: list[dict[str, Any]] = [{"content": text} for text in _CONTENTS]
    calls = [_make_calls([arguments]) for arguments in _ARGUMENTS] + [_make_calls(_ARGUMENTS[:2])]
    fields += [{"content": text, "tool_calls": each} for each in calls for text in ("", "Well.")]
    for messages in prompts:
        for each in fields:
            yield messages, {"role": "assistant", **each}
            for text in _REASONING:
                yield messages, {"role": "assistant", "reasoning_content": text, **each}


def _make_calls(arguments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": name, "type": "function", "function": {"name": "look_up", "arguments": each}}
        for name, each in zip(_CALL_IDS, arguments, strict=False)
    ]


def _encode_reply(
    encoder: ChatEncoder,
    messages: list[dict[str, Any]],
    message: dict[str, Any],
    tools: list | None,
) -> tuple[list[int], list[int]] | None:
    """Return the ids of a prompt and of the reply, stop token too; None where none are written."""
    try:
        sequences = encoder.encode([*messages, message], tools)
    except ChatError:
        return None
    if not sequences or not sequences[-1].replies:
        return None
    ids, reply = sequences[-1].input_ids, sequences[-1].replies[-1]
    return list(ids[: reply.start]), list(ids[reply.start : reply.stop])


def make_response_template(encoder: ChatEncoder) -> dict[str, Any] | None:
    """Return a response template of what the chat template writes around the fields of a reply.

    None where its grammar cannot say it: calls in a list, or arguments that are no JSON object.
    Whether it reads replies as the encoder does is to be measured (`find_disagreement`).
    """
    try:
        tools = _shown_tools(encoder)
        grammar = encoder.reply_grammar(tools)
        anchor = _find_prompt_ending(encoder, tools)
    except ChatError:
        return None
    if not grammar.is_known:
        return None
    opens = _targets(grammar, "start", "reasoning")
    if "" in opens:
        # The prompt itself opens the reasoning, with the last tag that it has.
        tag = re.search(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*\Z", anchor)
        if tag is None:
            return None
        opens = [*filter(None, opens), tag[0]]
        anchor = anchor[: tag.start()]
    stops = [encoder.decode_reply([stop]) for stop in encoder.stop_token_ids]
    closes = _reasoning_closes(grammar) if opens else []
    fields: dict[str, Any] = {}
    if opens:
        fields["reasoning_content"] = _text_field(open=opens, close=closes)
    if grammar.calls is not None:
        call_opens = _call_opens(grammar, closes)
        calls = _make_call_field(grammar, call_opens, stops)
        if calls is None:
            return None
        fields["tool_calls"] = calls
    fields["content"] = _make_content_field(grammar, opens, closes, stops)
    if not anchor or any("" in field.get("close", ()) for field in fields.values()):
        return None
    return {"defaults": {"role": "assistant"}, "start_anchor": anchor, "fields": fields}


def _text_field(**anchors: Any) -> dict[str, Any]:
    return {**anchors, "content": "text", "content_args": {"strip": False}}


def _targets(grammar: ReplyGrammar, node: ReplyNode, target: ReplyNode) -> list[str]:
    targets = grammar.nodes[node].targets
    return [marker for marker, to in targets.items() if to == target]


def _find_prompt_ending(encoder: ChatEncoder, tools: list | None) -> str:
    """Return the text with which prompts end, whatever was said."""
    questions = [[{"role": "user", "content": text}] for text in ("What is a lute?", "And a lyre!")]
    prompts = [encoder.tokenizer.decode(encoder.prompt(each, tools)) for each in questions]
    ending = _common_start([prompt[::-1] for prompt in prompts])[::-1]
    # The end of the user's turn may be another one behind a tool's result.
    for stop in map(encoder.decode_reply, ([each] for each in encoder.stop_token_ids)):
        ending = ending.rpartition(stop)[2].lstrip("\n") or ending
    return ending


def _common_start(texts: Sequence[str]) -> str:
    """Return the text with which all of them begin."""
    first, last = min(texts), max(texts)
    size = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first if size is None else first[:size]


def _reasoning_closes(grammar: ReplyGrammar) -> list[str]:
    """Return what ends reasoning: all that stands behind it, as far as it is the same."""
    to_content = _targets(grammar, "reasoning", "content")
    markers = [*to_content, *_targets(grammar, "reasoning", "calls"),
               *grammar.nodes["reasoning"].endings]  # fmt: skip
    common = _common_start([marker for marker in markers if marker])
    return list(dict.fromkeys([common, *(m for m in to_content if not _holds_more(m, common))]))


def _holds_more(marker: str, common: str) -> bool:
    """Whether more than white space stands behind the common beginning of a marker."""
    return bool(marker[len(common) :].strip())


def _call_opens(grammar: ReplyGrammar, closes: Sequence[str]) -> list[str]:
    """Return what may stand in front of a call's first part, behind the reasoning's end."""
    opens = [m for node in ("start", "content") for m in _targets(grammar, node, "calls")]
    for marker in _targets(grammar, "reasoning", "calls"):
        close = max((each for each in closes if marker.startswith(each)), key=len, default="")
        opens.append(marker[len(close) :])
    return list(dict.fromkeys(opens))


def _make_call_field(
    grammar: ReplyGrammar, opens: list[str], stops: Sequence[str]
) -> dict[str, Any] | None:
    """Return the field of calls, each a JSON object or a name with one; None for other forms."""
    calls = grammar.calls
    assert calls is not None
    endings = list(grammar.call_markers.endings)
    separator = None if calls.separator is None else calls.separator.at(0)
    if calls.parts[-1] != "arguments" or (calls.separator and calls.separator.at(1) != separator):
        return None
    close = _common_start([*endings, *([] if separator is None else [separator])])
    if separator is not None:
        opens = [*opens, separator[len(close) :]]
    inner = [marker.at(0) for marker in calls.inner]
    # A call within one JSON object: what stands in front of the name belongs to that object.
    brace = opens[0].rfind("{")
    lead = opens[0][brace:] if brace >= 0 else ""
    if lead and close.startswith("}") and all(each.endswith(lead) for each in opens):
        keys = _find_keys(lead, calls.parts, inner)
        if keys is None:
            return None
        opens = [each.removesuffix(lead) for each in opens]
        pattern, close, endings = "", close[1:], [each[1:] for each in endings]
        transform = {name: f"{{content.{key}}}" for name, key in keys.items() if name != "id"}
    else:
        pattern = "".join(
            f"(?P<{part}>[^\\n\\r\"'{{}}]+?){re.escape(marker)}"
            for part, marker in zip(calls.parts[:-1], inner, strict=True)
        )
        transform = {"name": "{name}", "arguments": "{content}"}
    closes = sorted({*filter(None, [close, *endings]), *(e + s for e in endings for s in stops)})
    field: dict[str, Any] = {
        "close": closes,
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": transform},
    }
    if not all(opens):
        # Nothing in front of a call shows where it begins, but the call itself.
        return None
    if pattern:
        field["open_pattern"] = f"(?:{'|'.join(map(re.escape, opens))}){pattern}"
    else:
        field["open"] = opens
    return field


def _find_keys(lead: str, parts: Sequence[str], inner: Sequence[str]) -> dict[str, str] | None:
    """Return the keys that a call's parts have in the JSON object around them."""
    words = [json.dumps({}) if part == "arguments" else f"zq{part}" for part in parts]
    text = lead + "".join(word + mark for word, mark in zip(words, [*inner, "}"], strict=True))
    try:
        value = json.loads(text)
    except ValueError:
        return None
    keys = {
        part: key
        for part, word in zip(parts, words, strict=True)
        for key, each in value.items()
        if each == (word if part != "arguments" else {})
    }
    return keys if len(keys) == len(parts) and len(value) == len(parts) else None


def _make_content_field(
    grammar: ReplyGrammar, opens: Sequence[str], closes: Sequence[str], stops: Sequence[str]
) -> dict[str, Any]:
    """Return the field of the content: all that is in no other field, or what has a marker."""
    endings = [ending + stop for ending in grammar.nodes["content"].endings for stop in stops]
    close = sorted(dict.fromkeys([*endings, *stops]), key=len, reverse=True)
    # An empty thought in front of the content is reasoning that is opened and closed.
    starts = [
        marker
        for marker in _targets(grammar, "start", "content")
        if not any(marker.startswith(each) for each in opens)
    ]
    for marker in _targets(grammar, "reasoning", "content"):
        begun = max((each for each in closes if marker.startswith(each)), key=len, default="")
        starts.append(marker[len(begun) :])
    if not starts or any(not start for start in starts):
        return _text_field(close=close)
    return _text_field(open=list(dict.fromkeys(starts)), close=close)
