"""The patterns in an adapter's settings end, before peft looks for them in the names of layers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from luthier.errors import UserError
from luthier.patterns import check_syntax, match_names

ALL_LINEAR = "all-linear"
"""The value of `lora.target_modules` that means each linear layer but the output layer."""
COMMON_LAYER_NAMES = (
    "model.layers.11.self_attn.q_proj",
    "model.layers.11.mlp.experts.127.gate_up_proj",
    "transformer.h.11.attn.c_attn",
    "model.language_model.layers.0.linear_attn.in_proj_qkvz",
    "bert.encoder.layer.11.attention.output.LayerNorm",
    "model.embed_tokens",
    "lm_head",
)
_PATTERN_FORMS = {
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
"""What peft 0.21 makes of the patterns in these settings."""


def match_layers(
    key: str,
    typed: str,
    names: Sequence[str],
    pattern: str,
    method: Literal["match", "fullmatch"],
) -> list[str]:
    """Return the names that a pattern matches; UserError for one that is none or takes too long.

    `pattern` is what peft makes of the one that was `typed`.
    """
    try:
        check_syntax(typed)
        return match_names(pattern, names, method)
    except (ValueError, TimeoutError) as error:
        raise UserError(f"{key}: {typed!r} {error}") from error


def check_adapter_patterns(
    prefix: str, settings: Mapping[str, Any], names: Sequence[str] = COMMON_LAYER_NAMES
) -> None:
    """Raise UserError for a pattern in an adapter's settings that would not end within peft.

    `prefix` stands before the name of the setting in the error. Without the names of a model they
    are common ones: a pattern that takes years on some of them takes years on most.
    """
    for key in ("target_modules", "exclude_modules"):
        target = settings.get(key)
        if isinstance(target, str) and target != ALL_LINEAR:
            match_layers(f"{prefix}{key}", target, names, target, "fullmatch")
    for key, form in _PATTERN_FORMS.items():
        value = settings.get(key) or ()
        for pattern in [value] if isinstance(value, str) else value:
            text = str(pattern)
            match_layers(f"{prefix}{key}", text, names, form.format(text), "match")
