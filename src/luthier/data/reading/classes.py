"""Columns of numbers that stand for named classes, as `datasets` writes them into Arrow tables."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

_KEY = b"huggingface"


def class_names(schema: "pyarrow.Schema") -> dict[str, list[str]]:
    """The names of the classes by column: of a class, or of a list of them, such as tags."""
    described = (schema.metadata or {}).get(_KEY)
    if described is None:
        return {}
    features = json.loads(described).get("info", {}).get("features") or {}
    found = {column: _class_names(feature) for column, feature in features.items()}
    return {column: names for column, names in found.items() if names is not None}


def _class_names(feature: Any) -> list[str] | None:
    """The names of a column's classes; None for a column of anything else."""
    while isinstance(feature, dict) and "feature" in feature:
        feature = feature["feature"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names: list[str] | None = feature.get("names")
    return names


def named(value: Any, names: list[str]) -> Any:
    """A class, or each of a list, by its name; -1, which means that there is none, as it stands."""
    if isinstance(value, list):
        return [named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
