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
from luthier.chat.argument_forms import KEY_MARK, EntryArguments
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
_LAST_TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*\Z")
_FUNCTION = {"name": "{name}", "arguments": "{content}"}
"""A call of which the opening has the name and the content the arguments."""


def choose_response_template(tokenizer: Any, encoder: ChatEncoder) -> dict[str, Any] | None:
    """Return the response template to save with a tokenizer whose chat template is the encoder's.

    The tokenizer's own one where it reads replies as `ChatEncoder.parse` does, else one that is
    made and does; None where neither does. Warns where the tokenizer's own is left out.
    """
    # Whatever the training leaves out, servers see.
    changes = {"max_length": None, "on_lost": "keep", "empty_replies": "train", "train_on": "last"}
    encoder = encoder.with_settings(changes)
    try:
        own = getattr(tokenizer, "response_template", None)
        problem = None if own is None else find_disagreement(own, encoder)
        if own is not None and problem is None:
            return dict(own)
        made = make_response_template(encoder)
        if made is not None and find_disagreement(made, encoder, is_exact=True) is not None:
            made = None
        if problem is not None:
            instead = "another one is saved" if made else "none is saved"
            warnings.warn(
                f"The tokenizer's response_template reads replies otherwise than the chat template "
                f"writes them, so {instead} in its place. {problem[:400]}",
                stacklevel=2,
            )
        return made
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
    question, result = _ask("What is a lute?"), _make_result("42")
    call = _make_calls([{"word": "lute"}])
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


def _ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _make_result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "look_up", "tool_call_id": _CALL_IDS[0], "content": text}


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

    None where its grammar cannot say it, such as texts of arguments with escapes of their own.
    Whether it reads replies as the encoder does is to be measured (`find_disagreement`).
    """
    try:
        tools = _shown_tools(encoder)
        grammar = encoder.reply_grammar(tools)
        anchors = _find_prompt_endings(encoder, tools)
    except ChatError:
        return None
    if not grammar.is_known:
        return None
    opens = _targets(grammar, "start", "reasoning")
    if "" in opens:
        # The prompt itself opens the reasoning, with the last tag that it has.
        tag = _LAST_TAG.search(anchors[0])
        if tag is None:
            return None
        opens = [*filter(None, opens), tag[0]]
        anchors = [anchor.removesuffix(tag[0]) for anchor in anchors]
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
    if not all(anchors) or any("" in field.get("close", ()) for field in fields.values()):
        return None
    if opens and not closes:  # the template ends no reasoning
        return None
    anchor = anchors[0] if len(set(anchors)) == 1 else list(dict.fromkeys(anchors))
    return {"defaults": {"role": "assistant"}, "start_anchor": anchor, "fields": fields}


def _text_field(**anchors: Any) -> dict[str, Any]:
    return {**anchors, "content": "text", "content_args": {"strip": False}}


def _targets(grammar: ReplyGrammar, node: ReplyNode, target: ReplyNode) -> list[str]:
    targets = grammar.nodes[node].targets
    return [marker for marker, to in targets.items() if to == target]


def _find_prompt_endings(encoder: ChatEncoder, tools: list | None) -> list[str]:
    """Return the texts with which prompts end, behind a question and behind a tool's result."""
    endings = [_find_ending(encoder, [[_ask("What is a lute?")], [_ask("And a lyre!")]], tools)]
    call = {"role": "assistant", "content": "", "tool_calls": _make_calls([{"word": "lute"}])}
    history = [_ask("What is a lute?"), call]
    try:
        results = [[*history, _make_result(text)] for text in ("42", "A lyre!")]
        endings.append(_find_ending(encoder, results, tools))
    except ChatError:  # the template knows no results of tools
        return endings
    # The result itself may be what is common, where the template does not show it.
    is_new = endings[1] and not endings[1].endswith(endings[0])
    return endings if is_new else endings[:1]


def _find_ending(encoder: ChatEncoder, asked: Sequence[list], tools: list | None) -> str:
    """Return the text with which the prompts of some conversations end together."""
    prompts = [encoder.tokenizer.decode(encoder.prompt(each, tools)) for each in asked]
    ending = _common_start([prompt[::-1] for prompt in prompts])[::-1]
    # The end of the turn before is none of the reply's.
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
    closes: list[str] = []
    # Where the prompt opens the reasoning, a reply without any begins with its end.
    is_open = "" in _targets(grammar, "start", "reasoning")
    nodes: tuple[ReplyNode, ...] = ("reasoning", "start") if is_open else ("reasoning",)
    for node in nodes:
        to_content = _targets(grammar, node, "content")
        markers = [*to_content, *_targets(grammar, node, "calls"), *grammar.nodes[node].endings]
        if any(markers):
            common = _common_start([marker for marker in markers if marker])
            closes += [common, *(m for m in to_content if not _holds_more(m, common))]
    return list(dict.fromkeys(closes))


def _holds_more(marker: str, common: str) -> bool:
    """Whether more than white space stands behind the common beginning of a marker."""
    return bool(marker[len(common) :].strip())


def _call_opens(grammar: ReplyGrammar, closes: Sequence[str]) -> list[str]:
    """Return what may stand in front of a call's first part, behind the reasoning's end."""
    opens = []
    for node in ("start", "content", "reasoning"):
        for marker in _targets(grammar, node, "calls"):
            close = max((each for each in closes if marker.startswith(each)), key=len, default="")
            opens.append(marker[len(close) :])
    return list(dict.fromkeys(opens))


def _make_call_field(
    grammar: ReplyGrammar, opens: list[str], stops: Sequence[str]
) -> dict[str, Any] | None:
    """Return the field of calls; None for forms that a response template cannot say."""
    calls = grammar.calls
    assert calls is not None
    endings = list(grammar.call_markers.endings)
    separator = None if calls.separator is None else calls.separator.at(0)
    if calls.parts[-1] != "arguments" or (calls.separator and calls.separator.at(1) != separator):
        return None
    close = _common_start([*endings, *([] if separator is None else [separator])])
    if separator is not None:
        opens = [*opens, separator[len(close) :]]
    if not all(opens):
        # Nothing in front of a call shows where it begins.
        return None
    names = "".join(
        f"(?P<{part}>[^\\n\\r\"'{{}}]+?){re.escape(marker.at(0))}"
        for part, marker in zip(calls.parts[:-1], calls.inner, strict=True)
    )
    open_pattern = f"(?:{'|'.join(map(re.escape, opens))}){names}"
    if isinstance(calls.arguments, EntryArguments):
        return _make_entry_field(calls.arguments, open_pattern, [e for e in endings if e])
    # A call within one JSON object: what stands in front of the name belongs to that object.
    brace = opens[0].rfind("{")
    lead = opens[0][brace:] if brace >= 0 else ""
    if lead and close.startswith("}") and all(each.endswith(lead) for each in opens):
        fronts = [each.removesuffix(lead) for each in opens]
        keys = _find_keys(lead, calls.parts, [marker.at(0) for marker in calls.inner])
        if all(fronts):
            ends = [close[1:], *(ending[1:] for ending in endings)]
            return None if keys is None else _make_object_field(fronts, ends, stops, keys)
        # The call alone shows where it begins; a brace may end any object in it.
        return _make_json_field(open_pattern, [e + stop for e in endings for stop in stops])
    closes = {*filter(None, [close, *endings]), *(e + s for e in endings for s in stops)}
    return _make_json_field(open_pattern, sorted(closes))


def _call_field(content: str, function: dict[str, str], **more: Any) -> dict[str, Any]:
    transform = {"type": "function", "function": function}
    return {**more, "repeats": True, "content": content, "transform": transform}


def _make_object_field(
    opens: list[str], ends: Sequence[str], stops: Sequence[str], keys: dict[str, str]
) -> dict[str, Any]:
    """Return the field of calls that are JSON objects, with the name and arguments as entries."""
    closes = {*filter(None, ends), *(end + stop for end in ends[1:] for stop in stops)}
    function = {name: f"{{content.{key}}}" for name, key in keys.items() if name != "id"}
    return _call_field("json", function, open=opens, close=sorted(closes))


def _make_json_field(open_pattern: str, closes: list[str]) -> dict[str, Any]:
    """Return the field of calls whose arguments are a JSON object behind the name."""
    return _call_field("json", _FUNCTION, open_pattern=open_pattern, close=closes)


def _make_entry_field(
    arguments: EntryArguments, open_pattern: str, endings: list[str]
) -> dict[str, Any] | None:
    """Return the field of calls whose arguments are written entry by entry.

    None for entries that differ by the type of their value, or are closed with their own key.
    """
    if len(arguments.markers) != 1:
        return None
    (markers,) = arguments.markers
    texts = [markers.middle, *markers.separators, *markers.closings]
    if len(texts) != 3 or any(KEY_MARK in text for text in texts) or arguments.escapes != "raw":
        return None
    middle, separator, closing = texts
    tail = f"(?:{'|'.join(map(re.escape, endings))})?" if endings else ""
    if arguments.quotes[0]:
        # JSON whose keys have no quotes, and whose texts have others, as Gemma 4 writes it.
        if (arguments.lead, middle, separator, closing[:1]) != ("{", ":", ",", "}"):
            return None
        dialect = {"unquoted_keys": True, "string_delims": [list(arguments.quotes)]}
        return _call_field(
            "json", _FUNCTION, open_pattern=open_pattern + r"(?=\{)",
            close_pattern=re.escape(closing[1:]) + tail, content_args=dialect,
        )  # fmt: skip
    lead, closed = re.escape(arguments.lead), re.escape(closing)
    if arguments.empty is not None:
        lead = f"(?:{lead}|(?={re.escape(arguments.empty)}))"
        closed = f"(?:{closed}|{re.escape(arguments.empty)})"
    entry = rf"(?P<key>[^\n]+?){re.escape(middle)}(?P<value>.*?)(?:{re.escape(separator)}|\Z)"
    # What values are is left to transformers, which goes by the tool's schema.
    return _call_field(
        "xml-inline", _FUNCTION, open_pattern=open_pattern + lead, close_pattern=closed + tail,
        content_args={"tag_pattern": entry},
    )  # fmt: skip


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
