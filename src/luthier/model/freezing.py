"""Full fine-tuning with parts frozen, chosen by patterns over the parameters' names."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from luthier.errors import UserError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHOWN = 20


def freeze(model: Any, train: Sequence[str], frozen: Sequence[str]) -> None:
    """Let only weights train that a pattern of `train` finds (all if there is none), less `frozen`.

    Patterns are regular expressions, found anywhere in a name; a matrix with two names (tied
    embeddings) is found by either. Raises UserError for a pattern that finds nothing and where
    nothing is left to train.
    """
    names: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    wanted = _found("model.train", train, names) if train else set(names)
    unwanted = _found("model.freeze", frozen, names)
    kept = {id(names[name]) for name in unwanted}
    trained = {id(names[name]) for name in wanted} - kept
    if not trained:
        raise UserError(
            f"model.freeze: {', '.join(frozen)} leaves nothing to train. The parameters: "
            f"{_shown(names)}."
        )
    for parameter in names.values():
        parameter.requires_grad_(id(parameter) in trained)


def _found(key: str, patterns: Sequence[str], names: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            text = f"{key}: {pattern!r} is not a regular expression: {error}."
            raise UserError(text) from error
        if not hits:
            raise UserError(_nothing(key, pattern, names))
        found |= hits
    return found


def _nothing(key: str, pattern: str, names: dict[str, Any]) -> str:
    parts = {part for name in names for part in name.split(".")} | {*names}
    near = difflib.get_close_matches(pattern, sorted(parts), n=3, cutoff=0.5)
    hint = f" Near it: {', '.join(near)}." if near else ""
    return f"{key}: {pattern!r} matches no parameter.{hint} The parameters: {_shown(names)}."


def _shown(names: dict[str, Any]) -> str:
    """All names with layers' numbers as N, the first of them where they are many."""
    kinds = list(dict.fromkeys(_NUMBER.sub("N", name) for name in names))
    return ", ".join(kinds[:_SHOWN]) + (", ..." if len(kinds) > _SHOWN else "")
