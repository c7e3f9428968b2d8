"""`luthier explain KEY`: what a setting takes and means, whose it is, and what sets it."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from luthier.cli.arguments import CommandLine
from luthier.config.foreign_settings import FOREIGN_SETTINGS
from luthier.config.json_schema import (
    OWNER,
    Node,
    config_schema,
    describe_type,
    find_node,
    walk_keys,
)
from luthier.config.passthrough import PASS_THROUGH_KEYS, libraries_of
from luthier.config.recipes import (
    check_option,
    format_path,
    list_options,
    read_key_comments,
    read_recipe_header,
)
from luthier.config.renamed_settings import new_key
from luthier.config.schema import GROUPS, RunConfig
from luthier.config.validate import describe_key, read_value
from luthier.errors import UserError, ask_nearest, format_for_hydra

COMMAND_LINE = CommandLine(
    "explain",
    "luthier explain KEY|GROUP|GROUP=OPTION [recipe=NAME] [key=value ...]\n\nSays what a setting "
    "takes, what it means, whose it is, its default and which options set it.\nWith a recipe or "
    "other settings it also says the value there, and which file sets it.",
    (),
    "  luthier explain trainer.args.learning_rate recipe=quickstart\n"
    "  luthier explain trainer.args.beta trainer=dpo   a setting of one method\n"
    "  luthier explain trainer.evaluation              every key below this one\n"
    "  luthier explain lora                            a group with its options\n"
    "  luthier explain lora=dora                       one option\n"
    "  luthier explain micro_batch_size                another trainer's name for a setting\n",
)


class ChosenConfig(NamedTuple):
    """The config of the overrides behind the key, and where each key of it was written."""

    resolved: dict[str, Any]
    composed: Any
    """A `luthier.config.compose.ComposedConfig`."""

    def has_option(self, group: str, option: str) -> bool:
        """Return whether the config is made of this option of a group."""
        return option == self.composed.choices.get(group)


def run(arguments: list[str]) -> int:
    """Print what a key means. Raises UserError for a key that does not exist."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    words = COMMAND_LINE.parse(arguments).overrides
    if not words or words[0].startswith("recipe=") or not words[0].strip(".=+~"):
        raise UserError("Name a key first: luthier explain trainer.args.learning_rate")
    word, *settings = words
    print("\n".join(explain(word, _compose(settings) if settings else None)))
    return 0


def _compose(settings: list[str]) -> ChosenConfig:
    # Hydra is needed for this alone.
    from luthier.config.compose import compose_config, resolve_config
    from luthier.config.load import format_mistakes
    from luthier.redaction import remember_secrets

    composed = compose_config(settings)
    if composed.mistakes:
        raise UserError(format_mistakes(composed.mistakes, composed))
    resolved = resolve_config(composed)
    remember_secrets(resolved)
    return ChosenConfig(resolved, composed)


def explain(word: str, chosen: ChosenConfig | None = None) -> Iterator[str]:
    """Yield the lines about a key, a group, `GROUP=OPTION` or a part of a key."""
    key, equals, value = word.lstrip("+~").partition("=")
    key = key.strip(".")
    if equals and key in GROUPS:
        yield from _explain_option(key, value)
        return
    node = _find(key, chosen)
    is_own_name = "." not in key and (node is not None or key in FOREIGN_SETTINGS)
    refused = None if is_own_name else _refused(key, chosen)
    if refused:
        yield from _wrap(refused, "")
    elif node is not None and ("properties" in node or key in GROUPS):
        yield from _explain_prefix(key, node)
    elif mapping := None if node and OWNER in node else _find_mapping(key, chosen):
        yield from [f"{key} is an entry of {mapping}.", "", *explain(mapping, chosen)]
    elif node is None:
        yield from _explain_other_name(key, value, chosen)
    else:
        yield from _explain_key(key, node, chosen)


def _refused(key: str, chosen: ChosenConfig | None) -> str | None:
    """Return what to use in place of a library's setting that luthier decides itself."""
    for library in libraries_of(dict(chosen.resolved if chosen else _USUAL_METHODS)):
        name = key.removeprefix(f"{library.key}.")
        if name in library.refused_settings and (name != key or "." not in key):
            return f"{library.key}.{name} is not set here: {library.refused_settings[name]}."
    return None


_USUAL_METHODS: Mapping[str, Any] = {"trainer": {"method": "sft"}, "lora": {"method": "lora"}}


def _find(key: str, chosen: ChosenConfig | None) -> Node | None:
    """Return what a key takes in a config; without one, for `sft` and LoRA if they have it."""
    if chosen:
        return find_node(config_schema(chosen.resolved), key)
    return find_node(config_schema(_USUAL_METHODS), key) or find_node(config_schema(), key)


def _find_mapping(key: str, chosen: ChosenConfig | None) -> str | None:
    """Return the key above that takes entries of any name, such as `dataset.columns`."""
    above = key
    while "." in above:
        above = above.rpartition(".")[0]
        if node := _find(above, chosen):
            is_open = "properties" not in node and OWNER in node
            return above if is_open and "mapping" in describe_type(node) else None
    return None


def _explain_other_name(key: str, value: str, chosen: ChosenConfig | None) -> Iterator[str]:
    """Yield the lines about what is a key under another name, or with its group left out."""
    root = config_schema(chosen.resolved if chosen else None)
    keys = [each for each, _ in walk_keys(root)]
    foreign = FOREIGN_SETTINGS.get(key.rpartition(".")[2])
    if new := new_key(key):
        yield from [f"{key} is called {new} now.", "", *explain(new, chosen)]
    elif foreign and value:
        yield from _wrap(
            f"{key} is another trainer's name. {foreign.explain(read_value(value))}", ""
        )
    elif foreign:
        yield from _wrap(f"{key} is another trainer's name. {foreign.about}", "")
        for each in foreign.keys[:1]:
            yield from ["", *explain(each, chosen)]
    elif same := [each for each in keys if each.rpartition(".")[2] == key]:
        yield from explain(same[0], chosen)
        if len(same) > 1:
            yield f"\nThere {_are(same[1:])} also {', '.join(same[1:])}."
    else:
        raise UserError(_no_such_key(key, keys))


def _are(keys: list[str]) -> str:
    return "is" if len(keys) == 1 else "are"


def _no_such_key(key: str, keys: list[str]) -> str:
    group, _, name = key.rpartition(".")
    beside = [each for each in keys if each.rpartition(".")[0] == group]
    hint = ask_nearest(
        name, [each.rpartition(".")[2] for each in beside], f"{group}." * bool(group)
    )
    hint = hint or ask_nearest(name, [*GROUPS, *keys])
    last_names = {each.rpartition(".")[2]: each for each in reversed(keys)}
    same = [each for each in keys if each.lower() == key.lower()]
    hint = f"Did you mean {same[0]}?" if same else hint
    if not hint and (near := ask_nearest(name, last_names)):
        hint = near
    return f"there is no key {key}. {hint or 'luthier explain GROUP lists the keys of a group.'}"


def _explain_key(key: str, node: Node, chosen: ChosenConfig | None) -> Iterator[str]:
    """Yield what one key takes, means and is set to."""
    yield from _wrap(f"{key}: {describe_type(node)}", "")
    yield ""
    if text := node.get("description"):
        yield from _wrap(text, "  ")
        yield ""
    yield from _row("owner", _owner(key, node))
    if "default" in node:
        yield from _row("default", format_for_hydra(node["default"]))
    else:
        yield from _row("default", "none" if node[OWNER] == "luthier" else "that of its class")
    yield from _options_table(_options_that_set(key, chosen))
    if chosen:
        yield from _row("here", _value_here(key, chosen))


def _owner(key: str, node: Node) -> str:
    """Return whose setting a key is, and how it gets there."""
    owners = node[OWNER].split(", ")
    in_library = any(key.startswith(f"{library.key}.") for library in PASS_THROUGH_KEYS)
    if not in_library or node[OWNER] == "luthier":
        return "luthier"
    more = f" and {len(owners) - 5} others" if len(owners) > 6 else ""
    names = ", ".join(owners[:5] if more else owners)
    hint = ""
    if len(owners) > 1:
        method = "trainer=NAME" if key.startswith("trainer.") else "lora.method=NAME"
        hint = f"; add {method} for what one of them says"
    return f"{names}, to which luthier passes it on{hint}"


def _options_that_set(key: str, chosen: ChosenConfig | None) -> Iterator[tuple[str, str]]:
    """Yield the options whose files have the key, each with the value and its comment."""
    group, _, name = key.partition(".")
    names_in_files = [(group, name)] if group in GROUPS else []
    for group, name in [*names_in_files, ("debug", key)]:
        for option, path in list_options(group).items():
            setting = read_key_comments(path).get(name)
            if setting and setting.value and (chosen is None or chosen.has_option(group, option)):
                yield f"{group}={option}", f"{setting.value:<8} {setting.comment}"


def _value_here(key: str, chosen: ChosenConfig) -> str:
    from luthier.config.load import find_origin
    from luthier.redaction import redact

    node: Any = chosen.resolved
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return "not set, so the default"
        node = node[name]
    name = key.rpartition(".")[2]
    shown = format_for_hydra(redact({name: node})[name])
    if key in chosen.composed.keys_typed:
        return f"{shown}, as typed"
    origin = find_origin(key, chosen.composed)
    return f"{shown}, set in {origin}" if origin else shown


def _explain_prefix(key: str, node: Node) -> Iterator[str]:
    """Yield a group's options and every key below a key, with default and meaning."""
    about = describe_key(RunConfig, key) or node.get("description", "")
    yield from _wrap(f"{key}: {about}" if about else key, "")
    if key in GROUPS:
        yield f"\nOptions: {key}=NAME (luthier explain {key}=NAME prints one)"
        options = list_options(key)
        yield from _table((name, read_recipe_header(path)) for name, path in options.items())
    below = [pair for pair in walk_keys(node, key) if pair[0] != key]
    if below:
        yield f"\nKeys, their defaults and meaning{_of_class(node)}"
        yield from _table(
            (name, f"{_short_default(each)}{_first_sentence(each.get('description', ''))}")
            for name, each in below
        )


def _of_class(node: Node) -> str:
    return f", of {node['x-library']}" if "x-library" in node else ""


def _short_default(node: Node) -> str:
    text = format_for_hydra(node["default"]) if "default" in node else "-"
    return f"{text:<10} "


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _explain_option(group: str, name: str) -> Iterator[str]:
    """Yield an option's file: its header, where it lies, and its keys with their comments."""
    if mistake := check_option(group, name):
        raise UserError(f"{mistake.key}: {mistake.text}")
    path = list_options(group)[name]
    yield f"{group}={name}  ({format_path(path)})"
    yield ""
    yield path.read_text(encoding="utf-8").rstrip()


def _width() -> int:
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _row(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _width(),
        initial_indent=f"  {name:<8} ",
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each name and its text, which is cut where the line is full."""
    pairs = list(rows)
    width = min(44, max((len(name) for name, _ in pairs), default=0)) + 1
    for name, text in pairs:
        start = f"  {name:<{width}} "
        room = max(_width() - len(start), 20)
        cut = text if len(text) <= room else f"{text[: room - 3].rstrip()}..."
        yield f"{start}{cut}".rstrip()


def _options_table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the options that set a key, each with the value and its whole comment."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0) + 2
    for number, (name, text) in enumerate(pairs):
        start = f"  {'' if number else 'set by':<8} {name:<{width}}"
        yield from textwrap.wrap(
            text,
            max(_width(), len(start) + 30),
            initial_indent=start,
            subsequent_indent=" " * (len(start) + 9),
            break_on_hyphens=False,
            break_long_words=False,
        )
