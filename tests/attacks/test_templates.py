"""No chat template hangs luthier or fills its memory: it is refused in words before it is used."""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

from helpers.chatml import CHATML, byte_tokenizer
from luthier.chat import ChatEncoder, ChatError, template_probe
from luthier.chat.template import ChatTemplate
from luthier.chat.template_file import MAX_TEMPLATE_CHARS, read_template
from luthier.chat.template_probe import (
    ProbeLimits,
    check_template,
    make_plain_environment,
    share_passed_templates,
)
from luthier.storage.cache import KeyFolder

LIMITS = ProbeLimits(cpu_seconds=1, wall_seconds=60.0, megabytes=160)
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% set ns = namespace(x='ab', l=[1], n=7) %}{% for i in range(90000) %}BOMB{% endfor %}"
ENDS = (
    "does not end within 1 seconds of processor time|needs more than 160 MB|needs too much memory"
)

DOUBLING = {
    "plus": "{% set ns.x = ns.x + ns.x %}",
    "tilde": "{% set ns.x = ns.x ~ ns.x %}",
    "join": "{% set ns.x = [ns.x, ns.x] | join %}",
    "method join": "{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}",
    "list": "{% set ns.l = ns.l + ns.l %}",
    "nested list": "{% set ns.l = [ns.l, ns.l] %}{% set ns.x = ns.l | string %}",
    "block set": "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
    "percent": "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
    "format filter": "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}",
    "format method": "{% set ns.x = '{0}{0}'.format(ns.x) %}",
    "replace": "{% set ns.x = ns.x | replace('a', 'aab') %}",
    "method replace": "{% set ns.x = ns.x.replace('a', 'aab') %}",
    "tojson": "{% set ns.x = ns.x | tojson %}{% set ns.x = ns.x + ns.x %}",
    "escape": "{% set ns.x = (ns.x ~ '&') | forceescape %}",
    "times": "{% set ns.x = ns.x * 2 %}",
    "translate": "{% set ns.x = ns.x.translate({97: 'aab'}) %}",
    "power": "{% set ns.n = ns.n ** 40 %}",
    "power of a variable": "{% set e = 9 %}{% set ns.n = ns.n ** e %}",
    "square": "{% set ns.n = ns.n * ns.n %}",
    "many texts": "{% set ns.l = ns.l + ['x' * 9999 + i | string] %}",
    "indent": "{% set ns.x = (ns.x + '\\n') | indent(ns.x | length) %}",
    "wordwrap": "{% set ns.x = ns.x | wordwrap(1, wrapstring='abcd') %}",
    "xmlattr": "{% set ns.x = {'a': ns.x ~ ns.x} | xmlattr %}",
    "message": "{% set ns.x = ns.x + messages[0].content + ns.x %}",
}
"""Bodies of a loop whose value grows with each step."""
EACH, END = "{% for a in range(99999) %}", "{% endfor %}"
SLOW = {
    "loops in loops": EACH + EACH + END * 2,
    "many loops": (EACH + "{% for b in range(9) %}" + END * 2) * 300,
    "much output": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a macro that doubles its text": (
        "{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{{ x }}{{ x }}{% else %}a{% endif %}"
        "{% endmacro %}{{ f(90) }}"
    ),
    "title of a large text": (
        "{% set x = 'ab ' * 999999 %}" + EACH + "{{ x.title() | length }}" + END
    ),
    "sort by a slow key": (
        "{{ range(99999) | map('string') | sort | join | list | sort | unique | list | length }}"
        * 40
    ),
    "tojson with an indent": "{{ [[[[[[1]]]]]] | tojson(indent=99999999) }}",
    "joiner": "{% set j = joiner('x' * 9999999) %}{% for i in range(9999) %}{{ j() }}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "a large text": "{{ 'a' * 99999999999 }}",
    "a large constant": "{{ 10 ** 9999999 }}",
    "products of constants": "{{ 'ab' * (1000 * 1000) * 1000 }}",
    "center": "{{ messages[0].content.center(2000000000) }}",
    "the filter center": "{% set n = 2000000000 %}{{ 'a' | center(n) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "expandtabs": "{{ '\\t\\t'.expandtabs(190000000) }}",
    "batch": "{{ [1] | batch(2000000000, 0) | list }}",
    "width of a number": "{{ '%2000000000d' % 1 }}",
    "width of a text": "{{ '{:>2000000000}'.format(messages[0].content) }}",
    "width from a value": "{{ '{:{}}'.format(1, 2000000000) }}",
    "very many slices": (
        "{{ range(99999) | slice(99999) | map('list') | list | string | length }}" * 40
    ),
    "messages to the power": "{% for a in messages %}" * 5 + "x" + "{% endfor %}" * 5,
    "subsets of messages": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(messages | length) }}"
    ),
}  # fmt: skip
LARGE = "{{ 'a' * 99999999999 }}"
HIDDEN = {
    "for tools": "{% if tools %}BOMB{% endif %}",
    "for 27 messages": "{% if messages | length == 27 %}BOMB{% endif %}",
    "for a long conversation": "{% if messages | length > 99 %}BOMB{% endif %}",
    "for a long text": "{% if messages[0].content | length > 9999 %}BOMB{% endif %}",
    "for a system message": "{% if messages[0].role == 'system' %}BOMB{% endif %}",
    "for a developer": "{% if messages[0].role == 'developer' %}BOMB{% endif %}",
    "for reasoning": "{% if messages[1].reasoning_content %}BOMB{% endif %}",
    "for a call": "{% if messages[1].tool_calls %}BOMB{% endif %}",
    "for a result": "{% if messages[2].role == 'tool' %}BOMB{% endif %}",
    "for content in parts": "{% if messages[0].content is not string %}BOMB{% endif %}",
    "for a prompt": "{% if add_generation_prompt %}BOMB{% endif %}",
    "for a day": "{% if strftime_now('%Y') == '2025' %}BOMB{% endif %}",
    "for the model's own token": "{% if bos_token == '<s>' %}BOMB{% endif %}",
    "in a macro": "{% macro f() %}BOMB{% endmacro %}{{ f() }}",
    "in a block": "{% set x %}BOMB{% endset %}{{ x }}",
    "in a generation block": "{% generation %}BOMB{% endgeneration %}",
}  # fmt: skip
OTHERS = {
    "60 loops inside each other": (
        "{% for a in [1] %}" * 60 + "x" + "{% endfor %}" * 60,
        "does not compile: Python refuses .*too many statically nested blocks",
    ),
    "3,000 brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
    "3,000 minus signs": ("{{ " + "-" * 3000 + "1 }}", "nested too deeply|ends the process"),
    "a macro without end": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "calls itself without end, tried on a plain conversation",
    ),
    "a division by zero": ("{{ 1 / 0 }}", "refuses the row: ZeroDivisionError"),
    "a tag that is none": ("{% evil %}", "does not compile: line 1: Encountered unknown tag"),
    "2 MB of template": ("x" * 2_000_000, "has 2,000,000 characters, and may have 1,000,000"),
}
CASES = (
    {f"growing by {name}": (LOOP.replace("BOMB", body), ENDS) for name, body in DOUBLING.items()}
    | {name: (source, ENDS) for name, source in SLOW.items()}
    | {f"hidden {name}": (place.replace("BOMB", LARGE), ENDS) for name, place in HIDDEN.items()}
    | OTHERS
)


@pytest.fixture(scope="module")
def refusals():
    """Return what is said of each hostile template and the seconds until then; two at a time."""

    def use(case):
        source, _ = case
        start = time.monotonic()
        try:
            template = ChatTemplate(source, VARIABLES, "2025-01-02", " of evil/model")
            template.render([{"role": "user", "content": "Hi"}], None, False)
        except ChatError as error:
            return str(error), time.monotonic() - start
        return "it is used", time.monotonic() - start

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(template_probe, "limits", LIMITS)
        return dict(zip(CASES, pool.map(use, CASES.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_template_is_refused_in_words(name, refusals):
    words, seconds = refusals[name]
    assert re.search(CASES[name][1], words), words
    assert words.startswith("the chat template")
    assert len(words) < 300
    assert seconds < 20


def test_the_error_names_the_model_or_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(template_probe, "limits", LIMITS)
    with pytest.raises(ChatError, match=r"the chat template of evil/model needs more than 160 MB"):
        ChatEncoder(byte_tokenizer(chat_template=LARGE, name_or_path="evil/model"))
    file = tmp_path / "mine.jinja"
    file.write_text(LARGE)
    with pytest.raises(ChatError, match=r"template `/.*/mine.jinja` needs more than 160 MB"):
        ChatEncoder(byte_tokenizer(), template=str(file))
    with pytest.raises(ChatError, match=r"the chat template of the settings needs more than 160"):
        ChatEncoder(byte_tokenizer(), template=LARGE)


@pytest.mark.parametrize("variables", [{"n": 99999999999}, {"n": 3}], ids=["large", "small"])
def test_variables_are_tried_too(variables, monkeypatch):
    monkeypatch.setattr(template_probe, "limits", LIMITS)
    source = "{{ messages[0].content * n }}"
    if variables["n"] == 3:
        assert str(ChatTemplate(source, variables, "2025-01-02").render(
            [{"role": "user", "content": "Hi"}], None, False
        )) == "HiHiHi"  # fmt: skip
    else:
        with pytest.raises(ChatError, match="needs more than 160 MB"):
            ChatTemplate(source, variables, "2025-01-02")


@pytest.fixture
def tries(monkeypatch):
    """Count the processes that are started, and forget which templates passed."""
    started = []
    run_child = template_probe._run_child
    monkeypatch.setattr(template_probe, "_passed", set())
    monkeypatch.setattr(template_probe, "_shared", set())
    monkeypatch.setattr(
        template_probe, "_run_child", lambda text: started.append(text) or run_child(text)
    )
    return started


def test_a_template_is_tried_once_on_a_machine(tmp_path, monkeypatch, tries):
    folder = tmp_path / "passed"
    share_passed_templates(KeyFolder(folder))
    check_template(CHATML, VARIABLES, "2025-01-02", "")
    check_template(CHATML, VARIABLES, "2025-01-03", "")  # it writes no date
    check_template(CHATML, {"unused": 1}, "2025-01-02", "")
    assert len(tries) == 1
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(template_probe, "_passed", set())  # as in another process
    check_template(CHATML, VARIABLES, "2025-01-02", "")
    assert len(tries) == 1
    check_template(CHATML + "{{ strftime_now('%d') }}", {}, "2025-01-02", "")
    check_template(CHATML + "{{ strftime_now('%d') }}", {}, "2025-01-03", "")
    assert len(tries) == 3


def test_a_hostile_template_is_never_noted(tmp_path, monkeypatch, tries):
    monkeypatch.setattr(template_probe, "limits", LIMITS)
    share_passed_templates(KeyFolder(tmp_path))
    for _ in range(2):
        with pytest.raises(ChatError, match="needs more than"):
            check_template(LARGE, {}, "2025-01-02", "")
    assert len(tries) == 2
    assert not any(tmp_path.iterdir())


def test_the_oldest_notes_go(tmp_path, monkeypatch):
    monkeypatch.setattr(KeyFolder, "MOST_KEYS", 3)
    keys = KeyFolder(tmp_path)
    for number, key in enumerate("abcde"):
        keys.add(key)
        os.utime(tmp_path / key, (number, number))
    assert [key for key in "abcde" if key in keys] == ["c", "d", "e"]
    (tmp_path / "file").touch()
    KeyFolder(tmp_path / "file").add("a")  # no folder can be made there: nothing is kept
    assert "a" not in KeyFolder(tmp_path / "file")


def test_a_process_that_cannot_be_started_is_said(monkeypatch, tries):
    monkeypatch.setattr(template_probe.sys, "executable", "/no/such/python")
    with pytest.raises(ChatError, match=r"cannot be tried, since no process .*No such file"):
        check_template(CHATML, {}, "2025-01-02", "")


def test_templates_are_tried_with_what_transformers_gives_them():
    """The environment of the child has all names of transformers' own."""
    real, ours = _cached_compile_jinja_template("").environment, make_plain_environment()
    for names in ("filters", "globals", "tests"):
        assert set(getattr(real, names)) == set(getattr(ours, names))
    tags = [{tag for e in env.extensions.values() for tag in e.tags} for env in (real, ours)]
    assert tags[0] == tags[1]
    assert (real.trim_blocks, real.lstrip_blocks) == (ours.trim_blocks, ours.lstrip_blocks)


def make_pipe(path):
    """Make a pipe that nobody writes to."""
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: "/dev/zero", "is a folder, a pipe or a device"),
        (lambda path: "/dev/stdin", "is a folder, a pipe or a device|no ordinary|no Jinja"),
        (make_pipe, "is a folder, a pipe or a device"),
        (lambda path: path.parent, "is a folder, a pipe or a device"),
        (lambda path: "/proc/self/environ", "is no ordinary file"),
        (lambda path: "/etc/passwd", "has no Jinja in it"),
        (lambda path: path.write_bytes(b"{{ x }}" * 200_000) and path, "longer than 1,000,000 by"),
        (lambda path: path.write_bytes(b"{{ \xff }}") and path, "can't decode byte 0xff"),
        (lambda path: path.symlink_to("/dev/zero") or path, "is a folder, a pipe or a device"),
        (lambda path: path.symlink_to(path) or path, "[Tt]oo many levels|[Ss]ymlink loop"),
        (lambda path: path, "there is no such file"),
        (lambda path: "~nobody-of-this-name/x", "home directory|no such file"),
        (lambda path: "a\0b", "null"),
        (lambda path: "a" * 5000, "too long"),
    ],
    ids=[
        "device", "stdin", "pipe", "folder", "proc", "no template", "large", "no text",
        "link to a device", "link to itself", "missing", "home of nobody", "null", "long name",
    ],
)  # fmt: skip
def test_what_is_no_file_of_a_template(make, words, tmp_path):
    with pytest.raises(ChatError, match=words) as raised:
        read_template(str(make(tmp_path / "t.jinja")))
    assert "root:" not in str(raised.value)


def test_a_template_file_is_read_as_text(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_bytes("{{ é }}\r\n{% if a %}\r{% endif %}".encode())
    assert read_template(str(file)) == "{{ é }}\n{% if a %}\n{% endif %}"
    assert len(file.read_text()) < MAX_TEMPLATE_CHARS
