"""A chat template as an Ollama Modelfile writes it, where the two can be shown to be equal.

Ollama's TEMPLATE is a template of Go over `.System` and `.Messages`. What stands around each role's
text is read off renderings of the Jinja template; the result is then rendered and held against the
Jinja template on conversations that have tripped such translations. Where one differs there is
none.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.chat.types import ChatError

Messages = list[dict[str, str]]
Render = Callable[[Messages, bool], str]
"""Messages and whether a reply is asked for -> the text."""

_ACTION = re.compile(r"{{(.*?)}}", re.S)
_ROLES = ("system", "user", "assistant")
_MARKS = {"system": "\ue000", "user": "\ue001", "assistant": "\ue002", "again": "\ue003"}
"""Characters for private use stand in for texts: no template looks for them."""


@dataclass(frozen=True)
class TurnFrames:
    """What a template writes around the text of each role."""

    around: dict[str, tuple[str, str]]
    """By role: what stands before and behind its text."""
    without_system: str
    """What it writes first where there is no system prompt."""
    generation: str
    """What a reply is written behind."""


def translate_template(render: Render, bos: str | None) -> str | None:
    """The Go template that writes what `render` writes, less the BOS token; None if there is none.

    Ollama puts the BOS token itself, as the model's file says.
    """
    try:

        def plain(messages: Messages, generation: bool) -> str:
            return render(messages, generation).removeprefix(bos or "")

        frames = _find_frames(plain)
        if frames is None:
            return None
        template = _write_go_template(frames)
        is_equal = all(
            render_probe(template, messages) == plain(messages, True)
            for messages in probe_conversations()
        )
        return template if is_equal else None
    except (ValueError, ChatError):
        # A role that the template refuses, or writes in more than one way.
        return None


def render_probe(template: str, messages: Messages) -> str:
    """Return what Ollama writes for alternating messages with the actions of a translation."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces = _ACTION.split(template)
    out, position = [], 0
    while position < len(pieces):
        action = pieces[position].strip() if position % 2 else None
        if action is None:
            out.append(pieces[position])
        elif action == "range .Messages":
            end = _find_block_end(pieces, position)
            out += [_render_message(pieces[position + 1 : end], message) for message in messages]
            position = end
        elif action == "if not .System":
            end = _find_block_end(pieces, position)
            out += [] if system else [pieces[position + 1]]
            position = end
        else:
            raise ValueError(f"not of the part of Go that is known here: {action}")
        position += 1
    return "".join(out)


def probe_conversations() -> list[Messages]:
    """Conversations that a translation must write as the template does."""
    texts = [
        "Hello.",
        " spaces around ",
        "\n\nlines around\n",
        "1. a\n2. b {{ c }} {% d %} <b>&amp;</b>",
        "<think>\nwell\n</think>\n\nYes.",
        'Größe: "quoted" \\n \t 漢字 🙂',
        "",
    ]
    turns = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text}
        for text in texts
        for number in range(2)
    ]
    # Each length ends with a user's message, since a reply is asked for.
    talks = [turns[: length + 1] for length in range(0, len(turns), 2)]
    talks += [[{"role": "user", "content": text}] for text in texts]
    talks += [_make_answered(text) for text in texts]
    systems = [{"role": "system", "content": text} for text in texts if text]
    return [*talks, *([system, *talk] for talk in talks for system in systems)]


def _make_answered(text: str) -> Messages:
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And?"},
    ]


def _find_frames(render: Render) -> TurnFrames | None:
    def mark_messages(*roles: str) -> Messages:
        # A role that comes again has a mark of its own, so that each mark stands once.
        marks = [
            _MARKS[role if role not in roles[:position] else "again"]
            for position, role in enumerate(roles)
        ]
        return [{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)]

    # Four conversations are enough to tell where one role's text ends and the next one begins.
    chat_pieces = _split_at_marks(
        render(mark_messages("system", "user", "assistant", "user"), True), 5
    )
    bare = _split_at_marks(render(mark_messages("user", "assistant", "user"), True), 4)
    prompt_pieces = _split_at_marks(render(mark_messages("user"), False), 2)
    reply_pieces = _split_at_marks(render(mark_messages("user", "assistant"), False), 3)
    if not (chat_pieces and bare and prompt_pieces and reply_pieces):
        return None
    behind_user, behind_assistant = prompt_pieces[-1], reply_pieces[-1]
    before_assistant = _remove_affix(chat_pieces[2], behind_user, start=True)
    before_user = _remove_affix(chat_pieces[3], behind_assistant, start=True)
    return TurnFrames(
        {
            "system": (chat_pieces[0], _remove_affix(chat_pieces[1], before_user, start=False)),
            "user": (before_user, behind_user),
            "assistant": (before_assistant, behind_assistant),
        },
        _remove_affix(bare[0], before_user, start=False),
        _remove_affix(chat_pieces[4], behind_user, start=True),
    )


def _split_at_marks(text: str, pieces: int) -> list[str] | None:
    """Return the text between the marks, if each stands once."""
    fragments = re.split("[" + "".join(_MARKS.values()) + "]", text)
    return fragments if len(fragments) == pieces else None


def _remove_affix(text: str, affix: str, start: bool) -> str:
    """Return a text without what it begins or ends with; ValueError where it does not."""
    if start and text.startswith(affix):
        return text[len(affix) :]
    if not start and text.endswith(affix):
        return text[: len(text) - len(affix)]
    raise ValueError("the template writes a role in more than one way")


def _write_go_template(frames: TurnFrames) -> str:
    pieces = [frames.without_system, frames.generation]
    pieces += [text for pair in frames.around.values() for text in pair]
    if any(sign in piece for piece in pieces for sign in ("{{", "}}", '"""')):
        raise ValueError("the template writes signs that Go or the Modelfile reads")
    first = frames.without_system
    head = "{{ if not .System }}" + first + "{{ end }}" if first else ""
    body = ""
    for number, role in enumerate(_ROLES):
        before, behind = frames.around[role]
        word = "else if" if number else "if"
        body += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
    return f"{head}{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{frames.generation}"


def _find_block_end(pieces: list[str], position: int) -> int:
    """Return where the block that begins at `position` ends."""
    depth = 0
    for number in range(position, len(pieces), 2):
        word = pieces[number].strip()
        # Branches of `else if` open no block of their own in Go.
        depth += word.startswith(("if ", "range "))
        depth -= word == "end"
        if depth == 0:
            return number
    raise ValueError("a block without its end")


def _render_message(pieces: list[str], message: dict[str, str]) -> str:
    """Render one message by the branches over its role."""
    out, is_its = [], False
    for number, piece in enumerate(pieces):
        action = piece.strip()
        if number % 2 == 0:
            out += [piece] if is_its else []
        elif " eq .Role " in f" {action} ":
            is_its = action.endswith(f'"{message["role"]}"')
        elif action == ".Content":
            out += [message["content"]] if is_its else []
        else:
            is_its = False
    return "".join(out)


def modelfile(template: str | None, model_path: str, stops: list[str]) -> str:
    """Return a Modelfile for a folder of merged weights; without TEMPLATE Ollama finds its own."""
    lines: list[Any] = [f"FROM {model_path}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    for stop in stops:
        # A token with a quotation mark in it needs the quotes of three.
        quotes = '"""' if '"' in stop else '"'
        lines.append(f"PARAMETER stop {quotes}{stop}{quotes}")
    return "\n".join(lines) + "\n"
