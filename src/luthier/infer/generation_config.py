"""Settings of generation: any field of `transformers.GenerationConfig`, greedy by default."""

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import UserError, nearest_option

MAX_NEW_TOKENS = 512
"""The longest reply where nobody says otherwise, in tokens."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
             "eta_cutoff")  # fmt: skip
"""Settings that mean nothing to greedy decoding: to give one is to ask for sampling."""

_PLAIN = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "min_length": 0,
}
"""Greedy decoding and nothing else. What is left open, transformers takes from the model's own
generation config, a penalty for repeated tokens among it."""

_READS_PROMPT = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None,),
    "bad_words_ids": (None,),
}
"""Settings that look at the tokens before the reply, padding and all, and their values for off."""

_ALONE = ("prompt_lookup_num_tokens", "use_mtp")
"""Settings with which transformers generates for one prompt at a time."""

_REFUSED = {
    "max_length": "counts the prompt too; use max_new_tokens",
    "pad_token_id": "is the tokenizer's; remove it",
    "return_dict_in_generate": "replies are text; remove it",
    "output_scores": "replies are text; remove it",
    "output_logits": "replies are text; remove it",
    "output_attentions": "replies are text; remove it",
    "output_hidden_states": "replies are text; remove it",
    "transformers_version": "is no setting; remove it",
    "continuous_batching_config": "luthier makes batches itself; remove it",
    "is_assistant": "needs a second model; remove it",
}


def check_generation_settings(requested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings if each is one of `transformers.GenerationConfig`; imports nothing large.

    A setting of sampling turns sampling on, and `temperature=0` off. Raises UserError for a name
    that does not exist and for settings that belong to luthier.
    """
    for name in requested:
        if name in _REFUSED:
            raise UserError(f"{name}: {_REFUSED[name]}.")
        if name not in generation_setting_names():
            near = nearest_option(name, generation_setting_names())
            guess = f" Did you mean {near}?" if near else ""
            raise UserError(f"{name}: is not a setting of transformers.GenerationConfig.{guess}")
    settings = dict(requested)
    longest = settings.get("max_new_tokens")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise UserError(f"max_new_tokens={longest}: write a whole number of at least 1.")
    # The APIs of others write greedy decoding as temperature=0, which transformers refuses.
    if settings.get("temperature") == 0:
        del settings["temperature"]
        settings.setdefault("do_sample", False)
    if any(name in settings for name in _SAMPLING):
        settings.setdefault("do_sample", True)
    return settings


def parse_generation_settings(assignments: list[str]) -> dict[str, Any]:
    """Return the settings in words such as `temperature=0.7`; raises UserError for others."""
    settings: dict[str, Any] = {}
    for word in assignments:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UserError(f"{word}: settings are written key=value, such as max_new_tokens=200.")
        try:
            # YAML, as in a config: numbers, true, null and lists need no further syntax.
            settings[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word}: the value cannot be read: {error}") from error
    return check_generation_settings(settings)


@cache
def generation_setting_names() -> frozenset[str]:
    """The fields of `transformers.GenerationConfig`, read from its source: nothing is imported."""
    # Importing transformers takes seconds, which a mistyped setting should not cost.
    spec = find_spec("transformers")
    file = Path((spec and spec.origin) or "").parent / "generation" / "configuration_utils.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "GenerationConfig"]
    (init,) = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return frozenset(filter(None, map(_popped, ast.walk(init))))


def _popped(node: ast.AST) -> str | None:
    """Return the name in `kwargs.pop(name, ...)`; None for any other node."""
    # transformers 5.23 has the fields as `kwargs.pop("name", default)` in __init__, and neither as
    # parameters nor as annotations.
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    first = node.args[0] if node.func.attr == "pop" and node.args else None
    name = first.value if isinstance(first, ast.Constant) else None
    return name if isinstance(name, str) and not name.startswith("_") else None


def make_generation_config(requested: Mapping[str, Any], stop_ids: list[int], pad_id: int) -> Any:
    """Return the `GenerationConfig` for settings that are checked; greedy where they are open.

    With sampling, what is open is the model's own, as its makers recommend it.
    """
    from transformers import GenerationConfig

    # Repeatable numbers come from greedy decoding without penalties; who samples wants what the
    # model's makers recommend in its generation_config.json.
    plain = {} if requested.get("do_sample") else _PLAIN
    settings = plain | {"eos_token_id": stop_ids, "use_cache": True} | dict(requested)
    if settings.get("max_new_tokens") is None:
        settings["max_new_tokens"] = MAX_NEW_TOKENS
    return GenerationConfig(**settings, pad_token_id=pad_id)


def depends_on_prompt(config: Any, model_config: Any) -> bool:
    """Whether the settings look at the tokens before the reply, so that padding would change it.

    `model_config` is the model's generation config, which fills what `config` leaves open.
    """
    for name, off in _READS_PROMPT.items():
        value = getattr(config, name)
        # transformers fills what is None from the model's own generation config in `generate`.
        value = getattr(model_config, name) if value is None else value
        if value not in off:
            return True
    return False


def needs_single_rows(config: Any) -> bool:
    """Whether transformers takes only one prompt at a time with these settings."""
    return any(getattr(config, name) for name in _ALONE)


def stop_token_ids(config: Any) -> list[int]:
    """Return the ids that end a reply; an empty list where the config has none."""
    ids = config.eos_token_id
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
