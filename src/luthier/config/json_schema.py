"""The JSON Schema of a config: every key with its type, options, default, meaning and owner.

Editors read it (`luthier schema`), and `luthier explain` and the reference page are made of it.
Keys of luthier come from `luthier.config.schema`, those of the libraries from their source.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from luthier.config import schema
from luthier.config.library_fields import UNKNOWN, FieldType, FieldTypes
from luthier.config.methods import ADAPTERS, METHODS
from luthier.config.number_ranges import RANGES, NumberRange
from luthier.config.passthrough import (
    PASS_THROUGH_KEYS,
    PassThroughKey,
    libraries_of,
    of_adapter,
    of_trainer,
)
from luthier.config.recipes import list_options, list_recipes
from luthier.config.schema import GROUPS, RunConfig, StrictModel
from luthier.config.validate import describe_key

Node = dict[str, Any]
"""A part of a JSON Schema: what one key takes."""

OWNER = "x-owner"
"""The key of a node that says whose setting it is: `luthier`, or a class of a library."""
USER_NAME = "NAME"
"""Stands in a key for a name that the user chooses, as in `dataset.sources.NAME.path`."""

_JSON_TYPES = {
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "str": "string",
    "list": "array",
    "dict": "object",
    "none": "null",
}
_INTERPOLATION = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
"""`${...}` stands for a value that is known later, and `???` for one that has to be set."""


def config_schema(resolved: Mapping[str, Any] | None = None) -> Node:
    """Return the schema of a whole config.

    `trainer.args` and `lora` take the settings of the methods that `resolved` names; without a
    config, those of all methods together.
    """
    definitions = RunConfig.model_json_schema()
    root = _expand(definitions, definitions["$defs"], RunConfig)
    libraries = PASS_THROUGH_KEYS if resolved is None else libraries_of(dict(resolved))
    for library in libraries:
        fields = library.fields() if resolved else _fields_of_all_methods(library)
        node = find_node(root, library.key)
        assert node is not None
        node["x-library"] = library.name
        if fields is not None:
            node["properties"] = {
                name: _setting_node(library.key, name, each) for name, each in fields.items()
            }
            node["additionalProperties"] = False
    return root


def recipe_schema() -> Node:
    """Return the schema of a recipe's file: any part of a config, and what it is made of."""
    root = _allow_interpolation(config_schema())
    options = {
        f"^(override )?/?{group}(@.*)?$": {"enum": [*list_options(group), None]} for group in GROUPS
    }
    parents = [recipe.name for recipe in list_recipes()]
    entry = {
        "anyOf": [
            {"enum": ["_self_", *parents]},
            {"type": "string", "pattern": r"^[\w./-]+$"},
            {
                "type": "object",
                "patternProperties": {**options, "^(override )?/?hydra/": {}},
                "additionalProperties": False,
            },
        ]
    }
    defaults = {
        "description": "The recipes to inherit (`- NAME`), and options of groups "
        "(`- override /GROUP: OPTION`).",
        "type": "array",
        "items": entry,
    }
    hydra = {"description": "Settings of sweeps, such as hydra.sweeper.", "type": "object"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of luthier",
        **root,
        "properties": {"defaults": defaults, **root["properties"], "hydra": hydra},
    }


def find_node(root: Node, key: str) -> Node | None:
    """Return what a dotted key takes; None where there is no such key."""
    node: Node | None = root
    for name in key.split("."):
        assert node is not None
        below = node.get("properties", {}).get(name)
        if below is None and isinstance(node.get("additionalProperties"), dict):
            below = node["additionalProperties"]
        if below is None:
            return None
        node = below
    return node


def walk_keys(node: Node, key: str = "") -> Iterator[tuple[str, Node]]:
    """Yield every key that takes a value, with what it takes, in the order of the schema."""
    further = node.get("additionalProperties")
    if "properties" not in node and not (isinstance(further, dict) and "properties" in further):
        yield key, node
    for name, below in node.get("properties", {}).items():
        yield from walk_keys(below, f"{key}.{name}".lstrip("."))
    if isinstance(further, dict) and "properties" in further:
        yield from walk_keys(further, f"{key}.{USER_NAME}")


def describe_type(node: Node) -> str:
    """Return what a key takes in words, such as `a whole number of at least 1, or null`."""
    options = list(dict.fromkeys(_type_words(node)))
    null = ", or null" if "null" in options and len(options) > 1 else ""
    options = [words for words in options if words != "null"] or options
    if examples := node.get("examples"):
        options[-1] = f"{options[-1]} such as {', '.join(examples)}"
    return f"{' or '.join(options)}{null}"


def _type_words(node: Node) -> Iterator[str]:
    for each in node.get("anyOf", [node]):
        if "anyOf" in each:
            yield from _type_words(each)
        elif "enum" in each:
            texts = ["null" if value is None else str(value) for value in each["enum"]]
            yield texts[0] if len(texts) == 1 else f"one of {', '.join(texts)}"
        else:
            yield _plain_type_words(each)


def _plain_type_words(node: Node) -> str:
    name = node.get("type")
    if name in ("integer", "number"):
        what = "a whole number" if name == "integer" else "a number"
        return f"{what}{_bound_words(node, name == 'integer')}"
    if name == "array":
        inner = node.get("items", {})
        return "a list" if len(inner) != 1 or "type" not in inner else f"a list of {inner['type']}s"
    words = {"boolean": "true or false", "string": "text", "object": "a mapping", "null": "null"}
    return words.get(str(name), "any value")


def _bound_words(node: Node, is_whole: bool) -> str:
    least, above = node.get("minimum"), node.get("exclusiveMinimum")
    most, below = node.get("maximum"), node.get("exclusiveMaximum")
    if is_whole and above is not None:
        least, above = above + 1, None
    words = [f"of at least {least:g}"] if least is not None and least > -(10**9) else []
    words += [f"above {above:g}"] if above is not None else []
    # Larger bounds only keep numbers within 32 bits.
    words += [f"at most {most:g}"] if most is not None and most < 10**6 else []
    words += [f"below {below:g}"] if below is not None and below < 10**6 else []
    return f" {' and '.join(words)}" if words else ""


@cache
def _models() -> dict[str, type[StrictModel]]:
    """Return the groups of the schema by the names of their classes."""
    values = vars(schema).values()
    return {
        value.__name__: value
        for value in values
        if isinstance(value, type) and issubclass(value, StrictModel)
    }


def _expand(node: Node, definitions: Node, model: type[StrictModel] | None = None) -> Node:
    """Return a node of pydantic's with definitions in their places, and with descriptions."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        others = {key: value for key, value in node.items() if key != "$ref"}
        return _expand({**definitions[name], **others}, definitions, _models()[name])
    # A recipe sets some keys, and groups the others.
    dropped = ("title", "required", "$defs")
    node = {key: value for key, value in node.items() if key not in dropped}
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    for name, below in node.get("properties", {}).items():
        described = _expand(below, definitions)
        text = describe_key(model, name) if model else ""
        if text or "description" not in described:
            described["description"] = text
        if model and "default" not in described and "properties" not in described:
            field = model.model_fields[name]
            if not field.is_required():
                described["default"] = field.get_default(call_default_factory=True)
        node["properties"] = {**node["properties"], name: {**described, OWNER: "luthier"}}
    for key in ("additionalProperties", "items"):
        if isinstance(node.get(key), dict):
            node[key] = _expand(node[key], definitions)
    if "anyOf" in node:
        node["anyOf"] = [_expand(each, definitions) for each in node["anyOf"]]
    return node


def _fields_of_all_methods(library: PassThroughKey) -> FieldTypes | None:
    """Return the settings of every method that a key may go to."""
    if library.key == "trainer.args":
        libraries = [of_trainer(library, method) for method in METHODS]
    elif library.key == "lora":
        libraries = [of_adapter(library, method) for method in ADAPTERS]
    else:
        return library.fields()
    together: FieldTypes = {}
    for each in libraries:
        for name, field_type in (each.fields() or {}).items():
            together[name] = _join(together[name], field_type) if name in together else field_type
    return together or None


def _join(one: FieldType, other: FieldType) -> FieldType:
    """Return a setting that takes the values of two classes."""
    owners = dict.fromkeys([*one.owner.split(", "), *other.owner.split(", ")])
    return replace(
        one | other,
        choices=tuple(dict.fromkeys((*one.choices, *other.choices))),
        default=one.default if one.default == other.default else UNKNOWN,
        owner=", ".join(owners),
    )


def _setting_node(key: str, name: str, each: FieldType) -> Node:
    """Return what a setting of a library takes."""
    numbers = RANGES.get(name) if key == "trainer.args" else None
    types: list[Node] = []
    if each.choices and "str" not in each.types:
        types.append({"enum": [*each.choices]})
    for name_of_type, json_type in _JSON_TYPES.items():
        if name_of_type in each.types and not (name_of_type == "int" and "float" in each.types):
            bounds = _range_bounds(numbers) if name_of_type in ("int", "float") else {}
            types.append({"type": json_type, **bounds})
    node: Node = {"description": each.help}
    if "any" not in each.types:
        node |= types[0] if len(types) == 1 else {"anyOf": types}
    if each.choices and "str" in each.types:
        node["examples"] = [*each.choices]
    if each.default != UNKNOWN:
        node["default"] = each.default
    return node | {OWNER: each.owner}


def _range_bounds(numbers: NumberRange | None) -> Node:
    if numbers is None or numbers.exceptions:
        return {}
    least = "exclusiveMinimum" if numbers.is_least_open else "minimum"
    most = "exclusiveMaximum" if numbers.is_most_open else "maximum"
    return {least: numbers.least, most: numbers.most}


def _allow_interpolation(node: Node) -> Node:
    """Return a node that also takes `${...}` in the place of any value."""
    if "properties" in node or isinstance(node.get("additionalProperties"), dict):
        node = dict(node)
        for name, below in node.get("properties", {}).items():
            node["properties"] = {**node["properties"], name: _allow_interpolation(below)}
        if isinstance(node.get("additionalProperties"), dict):
            node["additionalProperties"] = _allow_interpolation(node["additionalProperties"])
        return node
    about = {key: node[key] for key in ("description", "default", "examples", OWNER) if key in node}
    takes = {key: value for key, value in node.items() if key not in about}
    if not takes or takes == {"type": "string"}:
        return node
    return {**about, "anyOf": [*takes.get("anyOf", [takes]), _INTERPOLATION]}
