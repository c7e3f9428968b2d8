"""Whatever rows, files, templates and records hold, a terminal gets no control characters of it."""

import io
import json
import logging
import sys

import pytest
import yaml
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from helpers.chatml import byte_tokenizer
from luthier.chat import ChatEncoder, ChatError
from luthier.errors import UserError, report_error
from luthier.terminal import (
    PrintableStream,
    guard_output,
    make_console,
    print_json,
    print_yaml,
    printable,
)
from luthier.train import console as run_console

EVIL = "\x1b]0;PWNED\x07\x1b[2J\x1b[31m\x9b31m\x85\u202eevil\u2066\x7f\x08\x0b\x0c\rover\x00 琵琶 é"
UNPRINTABLE = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
UNPRINTABLE |= set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ud800")
ROW = {"prompt": EVIL, "before": EVIL, "after": EVIL, "expected": EVIL}


def unprintable(text):
    return sorted(set(text) & UNPRINTABLE)


class TerminalPage(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("character", sorted(UNPRINTABLE), ids=lambda c: f"U+{ord(c):04X}")
def test_every_control_character_has_a_sign(character):
    assert printable(f"a{character}b") == "a␦b"


@pytest.mark.parametrize("text", ["a\tb\n", "é 琵琶 ελ 🎻 ␦", "\u200fשלום", "\u2028\xa0"])
def test_all_other_text_stays(text):
    assert printable(text) == text


@pytest.fixture
def guarded(monkeypatch):
    """Return what prints on a terminal of its own, and gives back what arrived there."""

    def run(print_it):
        pages = TerminalPage(), TerminalPage()
        # Only now: pytest puts streams of its own in place behind each fixture.
        for name, page in zip(("stdout", "stderr"), pages, strict=True):
            monkeypatch.setattr(sys, name, page)
        guard_output()
        print_it()
        monkeypatch.undo()
        return "".join(page.getvalue() for page in pages)

    return run


def log_it():
    logger = logging.getLogger("a.library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.warning("bad row: %s", EVIL)
    logger.removeHandler(handler)


def raise_it():
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)


def refuse_it():
    source = "{{ raise_exception(messages[0].content) }}"
    with pytest.raises(ChatError) as raised:
        ChatEncoder(byte_tokenizer(), template=source).prompt([{"role": "user", "content": EVIL}])
    report_error(raised.value)


PRINTS = {
    "print": lambda: print(EVIL),
    "print to stderr": lambda: print(EVIL, file=sys.stderr),
    "print in pieces": lambda: print("a", EVIL, sep=EVIL, end=EVIL),
    "writelines": lambda: sys.stdout.writelines([EVIL, EVIL]),
    "a user's mistake": lambda: report_error(UserError(EVIL)),
    "a template's own words": refuse_it,
    "a log of a library": log_it,
    "a traceback": raise_it,
    "a line of a run": lambda: run_console.print_line(EVIL),
    "the table of replies": lambda: run_console.print_replies([ROW], 1),
    "JSON": lambda: print_json({EVIL: [EVIL]}),
    "YAML": lambda: print_yaml({EVIL: [EVIL]}),
    "half a character": lambda: print("file-\udcff"),
}


@pytest.mark.parametrize("name", PRINTS)
def test_no_way_of_printing_lets_them_through(name, guarded):
    text = guarded(PRINTS[name])
    for style in ("\x1b[1m", "\x1b[3m", "\x1b[2m", "\x1b[0m"):  # rich's own, of tables
        text = text.replace(style, "")
    assert unprintable(text) == []
    assert "PWNED" in text or name == "half a character"


RICH = {
    "text": lambda: Text(EVIL),
    "styled text": lambda: Text(EVIL, style="bold red"),
    "markup": lambda: f"[bold]{escape(EVIL)}[/bold]",
}


@pytest.mark.parametrize("name", RICH)
@pytest.mark.parametrize("colours", ["standard", None], ids=["colours", "no colours"])
def test_a_console_prints_no_escapes_but_its_own(name, colours):
    page = io.StringIO()
    console = make_console(file=page, force_terminal=True, color_system=colours, width=200)
    table = Table(title=RICH[name]())
    table.add_column(EVIL)
    table.add_row(RICH[name]())
    console.print(RICH[name](), soft_wrap=True)
    console.print(table)
    with Live(table, console=console, transient=True):
        print(f"\x1b]8;;http://x\x1b\\ \x1b[36mcyan {EVIL}")
    text = page.getvalue()
    assert "PWNED" in text
    for evil in ("\x1b]", "\x1b[36m", "\x1b[2J\x1b[31m", "\x9b", "\u202e", "\x7f", "\x08", "\x07"):
        assert evil not in text


def test_bars_still_move_their_line(guarded):
    text = guarded(lambda: list(tqdm(range(3), f"encode {EVIL}", mininterval=0, ncols=300)))
    assert text.count("\r") >= 3
    assert unprintable(text.replace("\r", "").replace("\x1b[A", "")) == []
    assert "PWNED" in text


def move_two_bars():
    outer, inner = tqdm(total=2, position=0), tqdm(total=2, position=1)
    for bar in (outer, inner, outer, inner):
        bar.update()
        bar.refresh()
    inner.close()
    outer.close()


def test_two_bars(guarded):
    assert "\x1b[A" in guarded(move_two_bars)


def test_data_stays_data(guarded):
    value = {"text": EVIL, "list": [EVIL, 1, None]}
    assert json.loads(guarded(lambda: print_json(value))) == value


@pytest.mark.parametrize("text", ["plain é", "\u202eback", "\x85\x9b"])
def test_yaml_stays_yaml(text, guarded):
    assert yaml.safe_load(guarded(lambda: print_yaml({"text": text}))) == {"text": text}


def test_a_terminal_without_unicode(monkeypatch):
    raw = io.BytesIO()
    stream = PrintableStream(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    stream.write(f"é {EVIL}")
    assert raw.getvalue().startswith(b"\\xe9 \\u2426]0;PWNED")


def test_the_guard_is_put_up_once(monkeypatch):
    page = io.StringIO()
    monkeypatch.setattr(sys, "stdout", page)
    guard_output()
    guard_output()
    assert sys.stdout.unguarded is page
    monkeypatch.setattr(sys, "stdout", None)
    guard_output()
    assert sys.stdout is None


RECORD = {
    "format": 1, "status": "finished", "command": ["train.py", EVIL], "versions": {EVIL: EVIL},
    "error": EVIL,
}  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["show", "RUN"],
        ["diff", "RUN", "RUN"],
        ["sweep", "RUN"],
        ["check", "RUN"],
        ["preview", f"recipe={EVIL}"],
        ["train", f"recipe={EVIL}"],
        ["train", "recipe=quickstart", f"dataset.path={EVIL}.jsonl", "dry_run=true"],
        ["train", "recipe=quickstart", f"+{EVIL}=1"],
        ["train", "recipe=quickstart", f"trainer.args.{EVIL}=1"],
        ["train", "recipe=quickstart", "--cfg", "job", f"run_name={EVIL}"],
        ["generate", "RUN", f"{EVIL}.jsonl", "-o", "out.jsonl"],
        ["evaluate", f"{EVIL}/x"],
        [EVIL],
    ],
    ids=lambda words: " ".join(words[:1] + ["evil" if EVIL in w else w for w in words[1:]])[:40]
    if isinstance(words, list) and words[0] != EVIL else "evil",
)  # fmt: skip
def test_commands_on_hostile_folders_and_words(words, luthier, workplace, capsys):
    workplace("RUN/config.yaml", f"recipe: {json.dumps(EVIL)}\n")
    workplace("RUN/run.json", json.dumps(RECORD))
    _, out, err = luthier(*words)
    assert out + err != ""
    assert unprintable(out + err) == []


FILES = {
    "a bad row": ("rows.jsonl", json.dumps({"messages": EVIL}) + "\n"),
    "no JSON": ("rows.jsonl", f'{{"a": "{EVIL}'),
    "odd columns": ("rows.jsonl", json.dumps({EVIL: 1, "\x1b[2J": 2}) + "\n"),
    "odd columns of CSV": ("rows.csv", f'"\x1b[2J","{EVIL[:20]}"\n1,2\n'),
    "a bad row of CSV": ("rows.csv", f'prompt,completion\n"{EVIL[:20]}"\n'),
    "an odd role": ("rows.jsonl", json.dumps({"messages": [{"role": EVIL, "content": "a"}]})),
    "a file's name": ("\x1b[2Jrows\x1b]0;PWNED\x07.jsonl", "{}\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_data_is_named_without_them(name, luthier, workplace):
    file, text = FILES[name]
    workplace(f"data/{file}", text)
    code, out, err = luthier("train", "recipe=quickstart", "dataset.path=data", "dry_run=true")
    assert code == 2
    assert unprintable(out + err) == []
