"""No filter, test, global or method of a string makes text of a row that has no origin."""

import functools
import re

import pytest
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

from luthier.chat import ChatError
from luthier.chat.conversation import read_conversation
from luthier.chat.template import ChatTemplate

DATE = "2025-01-02"
ENVIRONMENT = _cached_compile_jinja_template("").environment
VALUES = {
    "text": "m.content",
    "stripped": "m.content.strip()",
    "dict": "m.data",
    "nested": "[m.data.inner]",
    "texts": "m.data.texts",
    "number": "m.data.number",
    "views": "m.data.items()",
    "keys": "m.tool_calls[0].function.arguments.keys()",
    "call": "m.tool_calls",
    "messages": "messages",
    "namespace": "namespace(a=m.content)",
    "safe": "(m.content | safe)",
}
# Arguments that a filter can take, tried beside none; those that it refuses are left out.
ARGUMENTS = ["", "2", "m.content", "m.data", "2, m.content", "'ze', m.data"]
ARGUMENTS += ["m.content, 'x'", "attribute='key'", "'upper'", "'string'", "'%s'"]
METHODS = [name for name in dir(str) if not name.startswith("_")]
METHOD_ARGUMENTS = ["", "9", "m.content", "'ze', m.content", "9, m.content[:1]", "[m.content, 'b']"]
METHOD_ARGUMENTS += ["{122: m.content}", "m.data"]
FORMS = [
    "{0}", "'a' ~ {0}", "{0} ~ 'a' ~ 1", "'<' + {0}", "{0} + '<'", "'%s' % {0}",
    "'%(a)s' % {{'a': {0}}}", "'{{}}'.format({0})", "'{{a}}'.format(a={0})", "({0}) * 2", "{0}[0]",
    "({0}, 1)", "{{1: {0}}}", "[{0}] | map('string') | join", "[{0}] | map('upper') | list",
    "[{0}] | tojson", "({0} | list)[0]", "({0} | string)[1:-1]", "{0} if {0} is string else 'a'",
]  # fmt: skip
STATEMENTS = [
    "{{% set x = {0} %}}{{{{ x }}}}",
    "{{% set x %}}{{{{ {0} }}}}{{% endset %}}{{{{ x }}}}",
    "{{% filter upper %}}{{{{ {0} }}}}{{% endfilter %}}",
    "{{% macro f(x) %}}{{{{ x }}}}{{% endmacro %}}{{{{ f({0}) }}}}",
    "{{% for x in {0} %}}{{{{ x }}}}{{% endfor %}}",
    "{{% macro g() %}}{{{{ caller() }}}}{{% endmacro %}}"
    "{{% call g() %}}{{{{ {0} }}}}{{% endcall %}}",
    "{{% set ns = namespace(a='') %}}{{% set ns.a = ns.a ~ {0} %}}{{{{ ns.a }}}}",
    "{{% set c = cycler({0}, 'b') %}}{{{{ c.next() }}}}{{{{ c.current }}}}",
    "{{% set j = joiner({0}) %}}{{{{ j() }}}}{{{{ j() }}}}",
    "{{{{ strftime_now({0}) }}}}",
]
_LAZY = ("batch", "slice", "map", "select", "selectattr", "reject", "rejectattr", "unique", "items")
# What prints its address, or is drawn, is no text of the row.
_NO_TEXT = re.compile(
    r"<(?:generator|bound|built-in|function|dict_\w*iterator|\S*\.(?:Cycler|Joiner))"
)


@functools.cache
def sources():
    """Small templates, by the filter, method, global or form that each group is of."""
    texts = ("'%s zebra'", "['a', 'b']", "none")
    groups = {}
    for name in ENVIRONMENT.filters:
        values = [value for kind, value in VALUES.items() if kind not in ("stripped", "keys")]
        calls = [f"{value} | {name}({more})" for value in values for more in ARGUMENTS]
        calls += [f"{text} | {name}({value})" for value in VALUES.values() for text in texts]
        groups[f"filter {name}"] = [f"{call} | list" if name in _LAZY else call for call in calls]
    for name in METHODS:
        groups[f"method {name}"] = [
            f"{text}.{name}({more})"
            for text in ("m.content", "'<z{}>'", "'%s'")
            for more in METHOD_ARGUMENTS
        ]
    for name in sorted({*ENVIRONMENT.globals} - {"lipsum", "raise_exception"}):
        groups[f"global {name}"] = [f"{name}({more})" for more in ("m.content", "a=m.content")]
    groups |= {form: [form.format(value) for value in VALUES.values()] for form in FORMS}
    groups = {name: ["{{ " + call + " }}" for call in calls] for name, calls in groups.items()}
    return groups | {form: [form.format(value) for value in VALUES.values()] for form in STATEMENTS}


def row(text):
    """A row whose every text is the given one, or holds it."""
    call = {"function": {"name": text, "arguments": {text: [text]}}}
    data = {"key": text, "inner": {"key": text}, "texts": [text, f"a {text}"], "number": "12"}
    message = {"role": "user", "content": f" {text} ", "data": data, "tool_calls": [call]}
    return read_conversation([message])


def rendered(template, text):
    """The traced text of a template, and that of transformers' own environment.

    None where the template refuses the row: escaping that cannot be traced is refused, too.
    """
    conversation = row(text)
    inputs = template._inputs(conversation.messages, None, False)
    try:
        traced = template.render(conversation.messages, None, False)
    except ChatError as error:
        assert error.reason in ("template refuses", "untraceable")
        return None
    return traced, template._written_plainly(inputs)


def untraced(template, source):
    """What of a template's text depends on the row and has no origin; None if nothing does."""
    first = rendered(template, "zebra")
    if first is None or _NO_TEXT.search(first[1]) or "random" in source:
        return None
    traced, plain = first
    assert str.__str__(traced) == plain
    other = rendered(template, "tapir")
    depends = other is not None and other[1] != plain
    position, bare = 0, []
    for length, origin, _ in traced._runs:
        if origin is None:
            bare.append(plain[position : position + length])
        position += length
    shown = [text for text in bare if "zebra" in text.casefold() or "arbez" in text.casefold()]
    if "zebra" not in source and shown:
        return shown
    return plain if depends and len("".join(bare)) == len(plain) else None


@pytest.mark.parametrize("name", sources())
def test_text_of_the_row_keeps_its_origin(name):
    templates = sources()[name]
    # One template holds the whole group, as compiling takes longest.
    choices = "".join(f"{{% elif pick == {n} %}}{source}" for n, source in enumerate(templates))
    template = ChatTemplate(
        "{% set m = messages[0] %}{% if pick is undefined %}" + choices + "{% endif %}", {}, DATE
    )
    lost = {}
    for number, source in enumerate(templates):
        template.variables = {"pick": number}
        found = untraced(template, source)
        if found is not None:
            lost[source] = found
    assert not lost


def test_most_of_the_templates_show_text():
    """The expressions above are not all refused, whatever a new version takes."""
    shown = 0
    for source in sources()["filter string"]:
        template = ChatTemplate("{% set m = messages[0] %}" + source, {}, DATE)
        shown += rendered(template, "zebra") is not None
    assert shown >= len(VALUES) - 2
