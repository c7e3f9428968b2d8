"""Who may speak in a conversation: the roles that models know, and those that a template names.

A template that writes `message.role` as it stands takes any role, and a model trained on
`<|im_start|>human` never sees it again: servers send `user`. So a role must be one of `ROLES`, or
one that the template compares the role of a message with, or one that the settings name.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from re import Pattern

from jinja2 import nodes

from luthier.chat.conversation import Conversation
from luthier.chat.types import ChatError
from luthier.errors import format_override

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles of OpenAI's chats, which every server knows."""
_OTHER_NAMES = {
    "user": ("human", "prompter", "usr", "customer", "client"),
    "assistant": ("gpt", "bot", "chatgpt", "chatbot", "model", "ai", "agent", "claude", "bard"),
    "tool": ("function", "observation", "ipython", "function_response", "tool_response"),
}
_ROLE_OF_NAME = {name: role for role, names in _OTHER_NAMES.items() for name in names}


_SHOWN_CHARS = 40
"""Characters of a role that an error shows."""


class RoleChecker:
    """Refuses the messages of roles that one template is not made for."""

    def __init__(
        self, tree: nodes.Template, control_tokens: Pattern[str], more_roles: Collection[str] = ()
    ) -> None:
        """`tree`: the parsed template; `more_roles`: those that the settings name."""
        self.template_roles = frozenset(_find_roles(tree)) - {*ROLES}
        self._control_tokens = control_tokens
        self._allowed = frozenset({*ROLES, *self.template_roles, *more_roles})
        self._safe = frozenset(r for r in self._allowed if not control_tokens.search(r))

    def check(self, conversation: Conversation) -> None:
        """Raise ChatError for the first message whose role is not known, with the nearest one."""
        for number, message in zip(conversation.numbers, conversation.messages, strict=True):
            self._check_role(message["role"], number)

    def allows(self, roles: Iterable[str]) -> bool:
        """Return whether all of these roles are known."""
        return self._safe.issuperset(roles)

    def _check_role(self, role: str, number: int) -> None:
        if role in self._safe:
            return
        token = self._control_tokens.search(role)
        if token is not None:
            raise ChatError(
                f"the role {_shorten(role)!r} holds the control token {token[0]!r}; a role is a "
                "name, such as `user`",
                reason="unknown role",
                message=number,
                field="role",
            )
        near = find_nearest_role(role, self._allowed)
        hint = f": did you mean {near!r}?" if near else "."
        own = ", ".join([*ROLES, *sorted(self._allowed - {*ROLES})])
        raise ChatError(
            f"the role {_shorten(role)!r} is not known{hint} Known roles: {own}. If the chat "
            f"template is made for this one, set {format_override('chat.roles', [_shorten(role)])}",
            reason="unknown role",
            message=number,
            field="role",
        )


def _shorten(role: str) -> str:
    """Return a role as messages show it: its start, with what cannot be printed escaped."""
    start = role if len(role) <= _SHOWN_CHARS else f"{role[:_SHOWN_CHARS]}..."
    return start.encode("utf-8", "backslashreplace").decode()


def find_nearest_role(role: str, known: Collection[str] = ROLES) -> str | None:
    """Return the known role that a name most likely means, None where none comes close."""
    name = role[:_SHOWN_CHARS].strip().lower()
    if name in known:
        return name
    if name in _ROLE_OF_NAME:
        return _ROLE_OF_NAME[name]
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def _find_roles(tree: nodes.Template) -> Iterator[str]:
    """Yield the texts that a template compares the role of a message with, or looks it up by."""
    for comparison in tree.find_all(nodes.Compare):
        operands = [comparison.expr, *(operand.expr for operand in comparison.ops)]
        if any(map(_is_role, operands)):
            for operand in operands:
                if not _is_role(operand):
                    yield from _texts(operand)
    for test in tree.find_all(nodes.Test):
        if _is_role(test.node):
            yield from (text for value in test.args or [] for text in _texts(value))
    # As in `messages | selectattr("role", "equalto", "system")`.
    for filtering in tree.find_all(nodes.Filter):
        arguments = filtering.args or []
        if arguments and isinstance(arguments[0], nodes.Const) and arguments[0].value == "role":
            yield from (text for value in arguments[2:] for text in _texts(value))
    for assignment in tree.find_all(nodes.Assign):
        names_roles = isinstance(assignment.target, nodes.Name) and _is_role(assignment.target)
        if names_roles and isinstance(assignment.node, nodes.List | nodes.Tuple):
            yield from _texts(assignment.node)
    # A table of roles, as in `{"user": "Human", "assistant": "Bot"}[message.role]`.
    for table in tree.find_all(nodes.Dict):
        keys = [*_texts(table)]
        if {*keys} & {*ROLES}:
            yield from keys


def _is_role(node: nodes.Node | None) -> bool:
    """Return whether an expression reads the role of a message."""
    if isinstance(node, nodes.Filter):
        return _is_role(node.node)
    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        first = node.args[0] if node.args else None
        if node.node.attr == "get":
            return isinstance(first, nodes.Const) and first.value == "role"
        return _is_role(node.node.node)
    return isinstance(node, nodes.Name) and "role" in node.name


def _texts(node: nodes.Node) -> Iterator[str]:
    """Yield the texts of a constant, of a list of constants, or of the keys of a table."""
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, nodes.List | nodes.Tuple):
        for item in node.items:
            yield from _texts(item)
    elif isinstance(node, nodes.Dict):
        for pair in node.items:
            yield from _texts(pair.key)
