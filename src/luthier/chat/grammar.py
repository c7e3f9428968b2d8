"""What can be told from a template's source alone, before it is run."""

from __future__ import annotations

from jinja2 import nodes

# State that is neither a variable nor an attribute of a namespace, so a watch does not see it.
_HIDDEN_STATE = frozenset({"cycler", "joiner"})
_LAZY = frozenset(
    {"map", "select", "reject", "selectattr", "rejectattr", "unique", "batch", "slice", "items"}
)


def is_followable(tree: nodes.Template) -> bool:
    """Whether all state that outlives a loop of the template can be watched."""
    if any(name.name in _HIDDEN_STATE for name in tree.find_all(nodes.Name)):
        return False
    # A variable that holds a lazy filter changes when it is read.
    kept = [assign.node for assign in tree.find_all(nodes.Assign)]
    return not any(isinstance(node, nodes.Filter) and node.name in _LAZY for node in kept)


def fixed_end(tree: nodes.Template) -> nodes.Template | None:
    """What stands behind the last loop, if it depends on nothing but the template's variables.

    Then the generation prompt, which must be mentioned only there, is one text for all rows.
    """
    last = max((place for place, node in enumerate(tree.body) if _all(node, nodes.For)), default=-1)
    if last < 0 or not isinstance(tree.body[last], nodes.For):
        return None
    before, behind = tree.body[: last + 1], tree.body[last + 1 :]
    if "add_generation_prompt" in _names(before, "load") | _names(before, "store"):
        return None
    macros = {macro.name for node in before for macro in _all(node, nodes.Macro)}
    moving = _names(before, "store") | macros | {"messages", "tools", "documents", "loop"}
    if _names(behind, "load") & moving:
        return None
    return nodes.Template(behind, lineno=1)


def _all(node: nodes.Node, kind: type[nodes.Node]) -> list:
    own = [node] if isinstance(node, kind) else []
    return own + list(node.find_all(kind))


def _names(body: list[nodes.Node], context: str) -> set[str]:
    return {name.name for node in body for name in _all(node, nodes.Name) if name.ctx == context}
