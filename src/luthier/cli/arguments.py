"""A tool's command line has flags of its own; all other words belong to the configuration."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from luthier.errors import UserError, nearest_option

_HELP = ("-h", "--help")


@dataclass(frozen=True)
class Flag:
    """A flag whose `value` names what follows it: N is a whole number, None makes it a switch."""

    name: str
    value: str | None
    about: str

    @property
    def typed(self) -> str:
        """Return the flag as it stands in a help page."""
        return self.name if self.value is None else f"{self.name} {self.value}"


TRUST = Flag("--trust", None, "let the run's folder or the recipe run code (luthier docs runs)")
"""The flag of all commands that read a run's folder or a recipe."""
BASE = Flag("--base", "MODEL", "the base of an adapter, where it is no longer where it was")
"""The flag of all commands that take an adapter."""


@dataclass
class ParsedArguments:
    """The words of a command line, sorted: overrides in order, and flags with their values."""

    overrides: list[str] = field(default_factory=list)
    switches: set[str] = field(default_factory=set)
    numbers: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def refuse_flags(self, flags: Iterable[str], reason: str) -> None:
        """Raise UserError for the first of these flags that was typed: it would have no effect."""
        for flag in flags:
            if flag in {*self.switches, *self.numbers, *self.texts}:
                raise UserError(f"{flag}: {reason}")


@dataclass(frozen=True)
class CommandLine:
    """The flags of one command, and the text of its help page around them."""

    name: str
    about: str
    flags: tuple[Flag, ...] = ()
    examples: str = ""

    def help(self) -> str:
        """Return the page that `--help` prints."""
        width = max((len(flag.typed) for flag in self.flags), default=0) + 2
        lines = [self.about.rstrip(), ""]
        if self.flags:
            lines += ["Flags", *(f"  {f.typed:<{width}}{f.about}" for f in self.flags), ""]
        if self.examples:
            lines += ["Examples", self.examples.rstrip(), ""]
        return "\n".join(lines)

    def asks_help(self, arguments: list[str]) -> bool:
        """Print the help page if the words ask for it, and say whether they did."""
        # Before parsing: help answers even where another word is wrong.
        if not any(word in _HELP for word in arguments):
            return False
        print(self.help(), end="")
        return True

    def parse(self, arguments: list[str]) -> ParsedArguments:
        """Take the words apart; raises UserError for an unknown flag or one without its value."""
        parsed = ParsedArguments()
        left = iter(arguments)
        for word in left:
            # A single dash names standard input in other tools and is no flag here.
            if word.startswith("-") and word != "-":
                self._take(word, left, parsed)
            else:
                parsed.overrides.append(word)
        return parsed

    def refuse_all(self, arguments: list[str]) -> None:
        """Raise UserError if there are any words: the command takes none."""
        if self.parse(arguments).overrides:
            raise UserError(f"`luthier {self.name}` takes no arguments.")

    def _take(self, word: str, left: Iterator[str], parsed: ParsedArguments) -> None:
        # Both `--flag value` and `--flag=value` are written by people and by scripts.
        name, equals, value = word.partition("=")
        flag = next((flag for flag in self.flags if flag.name == name), None)
        if flag is None:
            raise UserError(self._unknown(word, name))
        if flag.value is None:
            if equals:
                raise UserError(f"{word}: {name} takes no value. Write {name}.")
            parsed.switches.add(name)
            return
        value = value if equals else next(left, "")
        if flag.value == "N":
            parsed.numbers[name] = _number(name, value)
        # `--out --overwrite` means a forgotten value, not a folder called --overwrite.
        elif not value or value.startswith("-"):
            raise UserError(f"{name} needs a value. Write {flag.typed}.")
        else:
            parsed.texts[name] = value

    def _unknown(self, word: str, name: str) -> str:
        names = [flag.name for flag in self.flags] + ["--help"]
        near = nearest_option(name, names)
        guess = f" Did you mean {near}?" if near else ""
        return (
            f"{word}: luthier {self.name} has no such flag.{guess} Flags: {', '.join(names)}; "
            "settings are written key=value."
        )


def _number(name: str, value: str) -> int:
    if not value:
        raise UserError(f"{name} needs a number. Write {name} 3.")
    # isdigit alone also holds for digits such as a superscript two, which int() refuses.
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise UserError(f"{name} {value}: write a whole number of at least 1, such as {name} 3.")
    return int(value)
