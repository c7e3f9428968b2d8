"""The page docs/reference.md: every key of a config, from the schema and the comments in conf/.

What a library says about its settings is not repeated there: `luthier explain` prints it from the
installed version.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from luthier.config.json_schema import (
    OWNER,
    Node,
    config_schema,
    describe_type,
    find_node,
    walk_keys,
)
from luthier.config.library_fields import UNKNOWN
from luthier.config.recipes import KeyComment, list_options, read_key_comments, read_recipe_header
from luthier.config.schema import GROUPS
from luthier.errors import format_for_hydra

_INTRODUCTION = """\
# Configuration reference

Every key of a configuration: what it takes, its default, and what it means. `luthier explain KEY`
prints the same for one key, with what a library says about its own settings, and the value in a
recipe. [config.md](config.md) says how a configuration is put together.

The default is that of the key itself. An option of a group sets other values (`trainer=sft` a
learning rate of 2e-4), and `luthier explain GROUP=OPTION` prints them. Settings of a library are
those of {versions}; luthier passes them on as they are.

This page is generated (`make reference`).
"""
_LIBRARIES = ("trl", "transformers", "peft", "wandb")


def reference_page() -> str:
    """Return the text of docs/reference.md for the installed versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    root = config_schema({"trainer": {"method": "sft"}, "lora": {"method": "lora"}})
    lines = [_INTRODUCTION.format(versions=versions)]
    lines += ["## Keys without a group", ""]
    alone = {name: node for name, node in root["properties"].items() if name not in GROUPS}
    keys = [pair for name, node in alone.items() for pair in walk_keys(node, name)]
    lines += _own_keys(keys)
    for group in GROUPS:
        lines += _group(group, root)
    return "\n".join(lines).rstrip() + "\n"


def _group(group: str, root: Node) -> Iterator[str]:
    """Yield a group's heading, its options and its keys."""
    node = root["properties"].get(group)
    yield from ["", f"## {group}", ""]
    if node and node.get("description"):
        yield from [_sentence(node["description"]), ""]
    yield from ["| option | what it is |", "|---|---|"]
    for option, path in list_options(group).items():
        yield f"| `{group}={option}` | {_cell(read_recipe_header(path))} |"
    if node is None:  # debug sets keys of other groups
        return
    keys = [(key, each) for key, each in walk_keys(node, group) if each.get(OWNER) == "luthier"]
    # A source of a mixture, and an evaluation set, take the keys of the dataset itself.
    keys = [(key, each) for key, each in keys if not key.startswith(_SOURCES)]
    if keys:
        yield from ["", *_own_keys(keys)]
    if group == "dataset":
        yield from ["", _ABOUT_SOURCES]
    if group == "trainer":
        yield from _settings_by_option("trainer", "trainer.args")
    elif group == "lora":
        yield from _settings_by_option("lora", "lora")
    else:
        libraries = [key for key in (group, f"{group}.wandb") if "x-library" in _node(root, key)]
        for key in libraries:
            yield from _library_keys(key, _node(root, key), {})


def _node(root: Node, key: str) -> Node:
    return find_node(root, key) or {}


_SOURCES = ("dataset.sources.NAME.", "dataset.eval.sets.NAME.")
_ABOUT_SOURCES = (
    "A source of a mixture (`dataset.sources.NAME`) and a further evaluation set "
    "(`dataset.eval.sets.NAME`) take the keys from `dataset.path` to `dataset.repeats`."
)


def _own_keys(keys: Iterable[tuple[str, Node]]) -> Iterator[str]:
    """Yield the table of luthier's own keys."""
    yield from ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key, node in keys:
        meaning = _cell(node.get("description", ""))
        yield f"| `{key}` | {_cell(describe_type(node))} | {_default(node)} | {meaning} |"


def _settings_by_option(group: str, key: str) -> Iterator[str]:
    """Yield a table for each method: all settings, or how they differ from the usual method's."""
    usual: dict[str, Node] = {}
    seen: set[str] = set()
    options = {option: _method_of(group, path) for option, path in _with_usual_first(group)}
    for option, method in options.items():
        root = config_schema({"trainer": {"method": method}, "lora": {"method": method}})
        node = _node(root, key)
        if method in seen or "properties" not in node:
            continue
        seen.add(method)
        comments = read_key_comments(list_options(group)[option])
        below = f"{key.partition('.')[2]}.".lstrip(".")
        ours = {name.removeprefix(below): each for name, each in comments.items()}
        settings = {name: n for name, n in node["properties"].items() if n[OWNER] != "luthier"}
        heading = f" with `{group}={option}`" if len(seen) > 1 else ""
        # Adapters have little in common, configs of trainers nearly all.
        if group == "lora" or not usual:
            usual = settings
            yield from _library_keys(key, node, ours, heading)
            continue
        differing = {
            name: each
            for name, each in settings.items()
            if _without_owner(usual.get(name)) != _without_owner(each)
        }
        lacking = [name for name in usual if name not in settings]
        yield from _library_keys(key, {**node, "properties": differing}, ours, heading, lacking)


def _without_owner(node: Node | None) -> Node | None:
    """Return what a key takes: two classes that declare the same do not differ."""
    return node and {name: value for name, value in node.items() if name != OWNER}


def _with_usual_first(group: str) -> list[tuple[str, Path]]:
    options = list_options(group)
    first = "sft" if group == "trainer" else "default"
    return sorted(options.items(), key=lambda pair: pair[0] != first)


def _method_of(group: str, path: Path) -> str:
    """Return the method that an option's file names."""
    text = read_key_comments(path)
    method = text["method"].value if "method" in text else ""
    return method if method != UNKNOWN and method else ("sft" if group == "trainer" else "lora")


def _library_keys(
    key: str,
    node: Node,
    ours: dict[str, KeyComment],
    heading: str = "",
    lacking: Sequence[str] | None = None,
) -> Iterator[str]:
    """Yield the table of a library's settings, with the comment of the option that sets them.

    With `lacking` it holds what differs from the first table, whose settings named there are none
    of this library's.
    """
    if not node["properties"] and not lacking:
        return
    yield from ["", f"### `{key}`{heading}", ""]
    library, first = f"`{node['x-library']}`", ""
    if lacking is not None:
        without = ", ".join(f"`{name}`" for name in lacking)
        first = f" the settings of the first table{f' except {without}' if lacking else ''}, and"
    yield from [f"{library} takes{first} these:", ""]
    column = " set by the option |" if ours else ""
    yield f"| key | takes | default |{column} declared by |"
    yield "|---|---|---|---|---|" if ours else "|---|---|---|---|"
    for name, each in node["properties"].items():
        if each[OWNER] == "luthier":
            continue
        setting = ours.get(name)
        comment = f"`{setting.value}`: {_cell(setting.comment)}" if setting else ""
        middle = f" {comment} |" if ours else ""
        takes = _cell(describe_type(each))
        yield f"| `{key}.{name}` | {takes} | {_default(each)} |{middle} {each[OWNER]} |"


def _default(node: Node) -> str:
    if "default" not in node:
        return ""
    return f"`{_cell(format_for_hydra(node['default']))}`"


def _cell(text: str) -> str:
    """Return a text that a cell of a table can hold."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
