"""`luthier chat` holds a conversation with a model in the terminal, or with two side by side."""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.cli.arguments import BASE, TRUST, CommandLine, Flag
from luthier.errors import UserError
from luthier.infer import generation_config as generation
from luthier.infer.chat_session import ChatSession, Content
from luthier.storage.write_errors import explain_write_errors
from luthier.terminal import make_console, printable

# rich is imported in functions: help and a mistake in what was typed must answer at once.
if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from luthier.chat import ReplyDelta
    from luthier.config.trust import Trust
    from luthier.infer.llm import LLM, GeneratedReply
    from luthier.infer.prompt_images import PromptImage

CallResults = tuple[str, ...]
"""What the calls of a reply return, in their order."""

COMMAND_LINE = CommandLine(
    "chat",
    "luthier chat MODEL [key=value ...] [flags]\n\n"
    "A conversation with a model in the terminal. MODEL is a run's folder, a checkpoint, an\n"
    "adapter, a model's folder or hub name, or package:NAME. With --compare the base answers\n"
    "beside the tuned model, each in a conversation of its own; an adapter's base is in memory\n"
    "only once. Questions may also come through a pipe, a line each.\n\n"
    "Settings: any field of GenerationConfig, such as temperature=0.7 (greedy without);\n"
    "model.device, .dtype, .attention and .device_map; quantization=none, nf4 or int8.",
    (
        Flag("--compare", None, "base and tuned model side by side"),
        Flag("--system", "TEXT", "the system prompt"),
        Flag("--image", "FILE", "a picture that goes with the first message; /image for more"),
        Flag("--tools", "FILE", "a JSON list of tools to call; you type what a call returns"),
        Flag("--seed", "N", "for sampling"),
        BASE,
        TRUST,
    ),
    "  luthier chat runs/quickstart/default\n"
    "  luthier chat runs/quickstart/default --compare --system 'Turn the note into JSON.'\n"
    "  luthier chat Qwen/Qwen3-0.6B temperature=0.6 top_p=0.95\n"
    "  luthier chat Qwen/Qwen3-0.6B --tools tools.json\n",
)


def run(arguments: list[str]) -> int:
    """Chat until the user leaves; returns 0."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    from luthier.cli.model_arguments import open_llm, parse_model_arguments

    typed = parse_model_arguments("chat", parsed.overrides, ("MODEL",))
    tools = read_tools_file(parsed.texts["--tools"]) if "--tools" in parsed.texts else None
    llm = open_llm(typed, parsed)
    # Before loading: --compare with a model that has no base is refused at once.
    trust = typed.trust(parsed.switches)
    other = _base_of(llm, typed.llm(), trust) if "--compare" in parsed.switches else None
    settings: dict[str, Any] = dict(typed.generation)
    if "--seed" in parsed.numbers:
        settings["seed"] = parsed.numbers["--seed"]
    from luthier.environment import quiet_libraries

    quiet_libraries()
    system, image = parsed.texts.get("--system"), parsed.texts.get("--image")
    return _talk(llm, other, settings, system, tools, image)


def read_tools_file(name: str) -> list[dict[str, Any]]:
    """Return the tools of a JSON list, as in a row's column `tools`; UserError for other files."""
    from luthier.data.formats.messages import read_tools
    from luthier.data.rows import RowError

    path = Path(name).expanduser()
    try:
        tools = read_tools(path.read_text(encoding="utf-8-sig"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tools {name}: it cannot be read: {error}") from error
    except RowError as error:
        raise UserError(f"--tools {name}: {error}") from error
    if not tools:
        raise UserError(f"--tools {name}: it has no tools.")
    return tools


def _base_of(llm: "LLM", settings: dict[str, Any], trust: "Trust") -> "LLM":
    """Return the base to compare with: the adapter's own, or the model that the run began with."""
    from luthier.infer.llm import LLM

    if llm.has_adapter:
        return llm
    config = llm.artifact.config
    if config is None:
        raise UserError(f"--compare: {llm.artifact.name} is not tuned by a run here; it is a base.")
    return LLM(config.model.path, trust=trust, **settings)


def _talk(
    llm: "LLM",
    other: "LLM | None",
    settings: dict[str, Any],
    system: str | None,
    tools: list[dict[str, Any]] | None,
    image: str | None,
) -> int:
    console = make_console()
    with ExitStack() as stack:
        with make_console(stderr=True).status("loading"):
            stack.enter_context(llm)
            # An adapter's base is the same model with the adapter off: it is loaded only once.
            if other is not None and other is not llm:
                stack.enter_context(other)
        talk = ChatRepl(console, llm, other, settings, system, tools)
        if image is not None:
            talk.add_image(image)
        if sys.stdin.isatty():
            talk.interactive()
        else:
            # Through a pipe nobody types: no prompt, no history, and empty lines ask nothing.
            for line in sys.stdin:
                if line.strip():
                    talk.take(line.strip())
    return 0


# The columns of --compare.


class SideBySide:
    """Columns that fill up; at the end they stand in the terminal as a table."""

    def __init__(self, console: "Console", names: tuple[str, ...]) -> None:
        from rich.live import Live

        self._console, self._names = console, names
        self._texts = [""] * len(names)
        # Live cuts what is higher than the terminal, so it is transient, and the complete table is
        # printed once at the end.
        self._live = Live(console=console, transient=True, refresh_per_second=12)

    def __enter__(self) -> "SideBySide":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        if any(self._texts):
            self._console.print(self._table())

    def add(self, number: int, text: str) -> None:
        """Write on in a column, counted from 0."""
        self._texts[number] += text
        if self._console.is_terminal:
            self._live.update(self._table())

    def _table(self) -> "RenderableType":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
        for name in self._names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, self._texts))
        return table


class StyledText(NamedTuple):
    """A text and rich's name for its style."""

    text: str
    style: str


def _format_deltas(deltas: "Iterable[ReplyDelta]") -> Iterator[StyledText]:
    """Yield a reply as it is shown: reasoning dimmed, and each field from a new line on."""
    styles = {"reasoning": "dim", "content": "", "tool_call": "bold"}
    field: str | None = None
    for delta in deltas:
        text = f"{delta.name}({delta.text})" if delta.field == "tool_call" else delta.text
        is_new = field is not None and (delta.field != field or delta.field == "tool_call")
        field = delta.field
        yield StyledText(f"\n{text}" if is_new else text, styles[delta.field])


HELP = """\
  /system TEXT   put this in front of the conversation (it begins anew); /system - for nothing
  /image FILE    send a picture with the next message, to a model that reads images
  /reset         forget what was said
  /retry         answer the last message again
  /skip          leave the model's calls without results, and say something else
  /set KEY=VALUE settings of generation, such as temperature=0.7; /set shows them
  /save FILE     write the conversation as a row of JSONL
  /help          this page
  /quit          leave; so does Ctrl-D
  Ctrl-C stops a reply while it is written. A line that ends with \\ goes on in the next."""


class ChatRepl:
    """A conversation in the terminal, or two side by side."""

    def __init__(
        self,
        console: "Console",
        llm: "LLM",
        other: "LLM | None",
        settings: dict[str, Any],
        system: str | None,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """Begin a conversation; `other` answers beside `llm`, and is `llm` itself for its base.

        `tools`: what the models may call. The user types what a call returns; of two models side by
        side the calls are shown alone.
        """
        self._console, self._llm, self._other = console, llm, other
        self._settings = settings
        self._chats = [each.chat(system, tools) for each in (other, llm) if each is not None]
        self._last: Content | CallResults | None = None
        self._images: list[PromptImage] = []
        """The pictures that go with the next message of the user."""
        self._calls: list[dict[str, Any]] = []
        """The calls of the last reply, while they wait for results."""
        self._results: list[str] = []
        """The results of the first of them, as far as they were typed."""
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._system, "reset": self._reset, "retry": self._retry, "set": self._set,
            "save": self._save, "help": self._help, "stop": self._stop, "skip": self._skip,
            "image": self._image,
        }  # fmt: skip

    def interactive(self) -> None:
        """Read lines from the terminal until the user leaves."""
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - gives `input` a history and keys to edit a line
        self._note(f"{self._about()}\n/help says what there is; Ctrl-D leaves.\n")
        while (line := self._read()) is not None:
            try:
                if line in ("/quit", "/exit", "/q"):
                    return
                if line:
                    self.take(line)
            except KeyboardInterrupt:
                self._note("\nstopped")

    def take(self, line: str) -> None:
        """Do what a line says: a command, or something to say to the model, or a call's result."""
        name, _, rest = line[1:].partition(" ") if line.startswith("/") else ("", "", "")
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            # Only a word is a mistyped command: `/etc/hosts` or `/2` is something to say to the
            # model.
            elif name.isidentifier():
                self._note(f"/{name}: there is no such command; /help lists them.")
            elif self._calls:
                self._take_result(line)
            else:
                self._say(line)
        except UserError as error:
            self._note(str(error), "red")

    def _read(self) -> str | None:
        """Read a line, or several that end with a backslash; None at the end of the input."""
        lines, prompt = [], f"{self._open_call()} returns> " if self._calls else "> "
        print()
        try:
            while (line := input(prompt)).endswith("\\"):
                lines.append(line[:-1])
                prompt = ". "
            return "\n".join([*lines, line]).strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return ""

    def add_image(self, path: str) -> None:
        """Send a picture with the next message.

        Raises UserError for a file that is no picture, and for a model that reads text alone.
        """
        from luthier.infer.prompt_images import open_image

        for llm in (self._llm, self._other):
            if llm is not None and not llm.reads_images:
                raise UserError(f"{path}: {llm.artifact.name} reads text alone, and no images.")
        self._images.append(open_image(path))

    def _image(self, path: str) -> None:
        if not path:
            raise UserError("/image: which picture? Write /image FILE.")
        self.add_image(path)
        width, height = (self._images[-1][name] for name in ("width", "height"))
        self._note(f"{width} x {height} pixels, which go with your next message")

    def _say(self, text: str) -> None:
        """Say something, with the pictures that go with it, and write the replies."""
        images = [{"type": "image", "image": image} for image in self._images]
        self._images = []
        self._send([*images, {"type": "text", "text": text}] if images else text)

    def _send(self, last: Content | CallResults) -> None:
        """Send a message, or the results of calls, and write the replies."""
        self._last = last
        self._calls, self._results = [], []
        if self._other is None:
            self._alone(self._chats[0], last)
        else:
            self._beside(last)

    def _open_call(self) -> str:
        """Return the name of the next call that has no result."""
        return printable(self._calls[len(self._results)]["function"]["name"])

    def _take_result(self, text: str) -> None:
        self._results.append(text)
        if len(self._results) == len(self._calls):
            self._send(tuple(self._results))
        else:
            self._note(f"and what does {self._open_call()} return?")

    def _skip(self, _: str) -> None:
        if not self._calls:
            raise UserError("/skip: no call waits for a result.")
        self._calls, self._results = [], []
        self._note("the calls stay without results")

    def _alone(self, chat: ChatSession, last: Content | CallResults) -> None:
        """Write the reply as it comes."""
        from rich.text import Text

        ended: list[GeneratedReply] = []
        began = time.monotonic()
        stream = self._stream(chat, last, on_end=ended.append)
        try:
            for piece in _format_deltas(stream):
                # As Text, because brackets in a reply are no markup of rich.
                text_piece = Text(printable(piece.text), style=piece.style)
                self._console.print(text_piece, end="", soft_wrap=True)
        except KeyboardInterrupt:
            stream.close()
            self._note("\nstopped")
            return
        self._console.print()
        self._note(self._measure(ended, time.monotonic() - began))
        if chat.tools and ended and (calls := ended[0].message.get("tool_calls")):
            self._calls = calls
            self._note(f"not run: type what {self._open_call()} returns, or /skip")

    def _beside(self, last: Content | CallResults) -> None:
        """Write the base's reply and the tuned model's in two columns, one after the other."""
        with SideBySide(self._console, ("base", "tuned")) as columns:
            for number, chat in enumerate(self._chats):
                stream = self._stream_beside(number, chat, last)
                try:
                    for piece in _format_deltas(stream):
                        columns.add(number, printable(piece.text))
                except KeyboardInterrupt:
                    stream.close()
                    columns.add(number, " (stopped)")

    def _stream(
        self, chat: ChatSession, last: Content | CallResults, **more: Any
    ) -> "Generator[ReplyDelta]":
        if isinstance(last, tuple):
            return chat.answer_calls(last, **more, **self._settings)
        return chat.stream_deltas(last, **more, **self._settings)

    def _stream_beside(
        self, number: int, chat: ChatSession, last: Content | CallResults
    ) -> "Generator[ReplyDelta]":
        assert self._other is not None
        # Entered for each reply alone: the adapter must be on again when the tuned model answers.
        is_base = number == 0 and self._other is self._llm
        with self._llm.as_base() if is_base else nullcontext():
            yield from self._stream(chat, last)

    def _measure(self, ended: "list[GeneratedReply]", seconds: float) -> str:
        if not ended:
            return ""
        (reply,) = ended
        cut = "; cut at max_new_tokens" if reply.finish == "length" else ""
        plain = f"\nnot read as a message: {reply.parse_error}" if reply.parse_error else ""
        return f"{len(reply.ids):,} tokens, {len(reply.ids) / seconds:,.1f} a second{cut}{plain}"

    def _system(self, text: str) -> None:
        if not text:
            self._note(f"system prompt: {self._chats[0].system or 'none'}")
            return
        for chat in self._chats:
            chat.system = None if text == "-" else text
        self._reset("")

    def _reset(self, _: str) -> None:
        self._images, self._calls, self._results = [], [], []
        for chat in self._chats:
            chat.reset()
        self._note("the conversation begins anew")

    def _retry(self, _: str) -> None:
        if self._last is None:
            raise UserError("/retry: nothing was said yet.")
        for chat in self._chats:
            # A reply that was stopped midway is in the conversation too and goes with its question.
            chat.take_back(self._last if isinstance(self._last, tuple) else [self._last])
        self._send(self._last)

    def _set(self, text: str) -> None:
        self._settings |= generation.parse_generation_settings(text.split()) if text else {}
        assignments = [f"{name}={value}" for name, value in self._settings.items()]
        self._note(" ".join(assignments) or "greedy, and nothing else is set")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save: where to? Write /save FILE.")
        tools = {"tools": self._chats[0].tools} if self._chats[0].tools else {}
        rows = [
            {"messages": list(map(_saved_message, chat.messages)), **tools} for chat in self._chats
        ]
        path = Path(text).expanduser()
        # Appended, so that several conversations become one dataset of JSONL.
        with explain_write_errors(path, "/save"), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._note(f"written {text}")

    def _help(self, _: str) -> None:
        self._note(HELP)

    def _stop(self, _: str) -> None:
        self._note("Ctrl-C stops a reply while it is written; /quit ends the chat.")

    def _about(self) -> str:
        artifact, machine = self._llm.artifact, self._llm.machine
        on = f" on {artifact.base.path}" if artifact.adapter else ""
        return f"{artifact.name}{on}, {machine.device}, {machine.dtype}"

    def _note(self, text: str, style: str = "dim") -> None:
        from rich.text import Text

        if text:
            self._console.print(Text(text, style=style), soft_wrap=True)


def _saved_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as a row has it, whose pictures are files."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    from luthier.data.images.reader import is_web_address

    parts = []
    for part in content:
        if part["type"] == "image":
            source = part["image"]["source"]
            if not is_web_address(source):
                source = str(Path(source).expanduser().absolute())
            part = {"type": "image", "image": source}
        parts.append(part)
    return {**message, "content": parts}
