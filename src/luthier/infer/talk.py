"""What the chat in the terminal does with each line that is typed."""

import json
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from luthier.errors import UserError
from luthier.infer import generation_config as generation
from luthier.infer.beside import Beside
from luthier.infer.chat import Chat
from luthier.infer.stream import shown

if TYPE_CHECKING:
    from luthier.infer.llm import LLM, Reply

HELP = """\
  /system TEXT   put this in front of the conversation (it begins anew); /system - for nothing
  /reset         forget what was said
  /retry         answer the last message again
  /set KEY=VALUE settings of generation, such as temperature=0.7; /set shows them
  /save FILE     write the conversation as a row of JSONL
  /help          this page
  /quit          leave; so does Ctrl-D
  Ctrl-C stops a reply while it is written. A line that ends with \\ goes on in the next."""


class Talk:
    """A conversation in the terminal, or two side by side."""

    def __init__(
        self,
        console: Console,
        llm: "LLM",
        other: "LLM | None",
        settings: dict[str, Any],
        system: str | None,
    ) -> None:
        """`other`: what answers beside the model; the model itself for its base."""
        self._console, self._llm, self._other = console, llm, other
        self._settings = settings
        self._chats = [chat_of(each, system) for each in (other, llm) if each is not None]
        self._last: str | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._system, "reset": self._reset, "retry": self._retry, "set": self._set,
            "save": self._save, "help": self._help, "stop": self._stop,
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
        """Do what a line says: a command, or something to say to the model."""
        name, _, rest = line[1:].partition(" ") if line.startswith("/") else ("", "", "")
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            elif name.isidentifier():
                self._note(f"/{name}: there is no such command; /help lists them.")
            else:
                self._say(line)
        except UserError as error:
            self._note(str(error), "red")

    def _read(self) -> str | None:
        """What is typed, over several lines where they end with a backslash; None at the end."""
        lines, prompt = [], "> "
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

    def _say(self, text: str) -> None:
        self._last = text
        if self._other is None:
            self._alone(self._chats[0], text)
        else:
            self._beside(text)

    def _alone(self, chat: Chat, text: str) -> None:
        """Write the reply as it comes."""
        ended: list[Reply] = []
        began = time.monotonic()
        stream = chat.stream(text, on_end=ended.append, **self._settings)
        try:
            for piece in stream:
                self._console.print(Text(shown(piece)), end="", soft_wrap=True)
        except KeyboardInterrupt:
            stream.close()
            self._note("\nstopped")
            return
        self._console.print()
        self._note(self._measure(ended, time.monotonic() - began))

    def _beside(self, text: str) -> None:
        """Write the base's reply and the tuned model's in two columns, one after the other."""
        with Beside(self._console, ("base", "tuned")) as columns:
            for number, chat in enumerate(self._chats):
                stream = self._stream(number, chat, text)
                try:
                    for piece in stream:
                        columns.add(number, shown(piece))
                except KeyboardInterrupt:
                    stream.close()
                    columns.add(number, " (stopped)")

    def _stream(self, number: int, chat: Chat, text: str) -> Generator[str]:
        assert self._other is not None
        is_base = number == 0 and self._other is self._llm
        with self._llm.as_base() if is_base else nullcontext():
            yield from chat.stream(text, **self._settings)

    def _measure(self, ended: "list[Reply]", seconds: float) -> str:
        if not ended:
            return ""
        (reply,) = ended
        cut = "; cut at max_new_tokens" if reply.finish == "length" else ""
        return f"{len(reply.ids):,} tokens, {len(reply.ids) / seconds:,.1f} a second{cut}"

    def _system(self, text: str) -> None:
        if not text:
            self._note(f"system prompt: {self._chats[0].system or 'none'}")
            return
        for chat in self._chats:
            chat.system = None if text == "-" else text
        self._reset("")

    def _reset(self, _: str) -> None:
        for chat in self._chats:
            chat.reset()
        self._note("the conversation begins anew")

    def _retry(self, _: str) -> None:
        if self._last is None:
            raise UserError("/retry: nothing was said yet.")
        for chat in self._chats:
            chat.take_back(self._last)
        self._say(self._last)

    def _set(self, text: str) -> None:
        self._settings |= generation.parse(text.split()) if text else {}
        shown = [f"{name}={value}" for name, value in self._settings.items()]
        self._note(" ".join(shown) or "greedy, and nothing else is set")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save: where to? Write /save FILE.")
        rows = [{"messages": chat.messages} for chat in self._chats]
        try:
            with Path(text).expanduser().open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"/save {text}: cannot be written: {error.strerror}.") from error
        self._note(f"written {text}")

    def _help(self, _: str) -> None:
        self._note(HELP)

    def _stop(self, _: str) -> None:
        self._note("Ctrl-C stops a reply while it is written; /quit ends the chat.")

    def _about(self) -> str:
        artefact, machine = self._llm.artefact, self._llm.machine
        on = f" on {artefact.base.path}" if artefact.adapter else ""
        return f"{artefact.word}{on}, {machine.device}, {machine.dtype}"

    def _note(self, text: str, style: str = "dim") -> None:
        if text:
            self._console.print(Text(text, style=style), soft_wrap=True)


def chat_of(llm: "LLM", system: str | None) -> Chat:
    """A new conversation."""
    return llm.chat(system)
