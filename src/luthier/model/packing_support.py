"""Model types whose packed documents nothing keeps apart, known from config.json before a load.

`train/packing_check.py` measures every other model once it is loaded.
"""

from collections.abc import Mapping
from typing import Any

from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model.quantized import read_config_json

PACKING_ADVICE = (
    "Set trainer.args.packing=false and trainer.args.eval_packing=false; "
    "trainer.args.train_sampling_strategy=group_by_length keeps padding small."
)
"""What to set for a model that cannot train packed rows."""
_ALIBI = "its ALiBi biases count from the beginning of a row, not of a document"
_RECURRENT = "its recurrent layers carry a state from each document of a row into the next one"
_POSITIONS = "it counts the positions of packed documents from another number than those of rows"
_MASKS = "its attention takes no masks of single documents"
_UNPACKABLE = {
    "bloom": _ALIBI,
    "rwkv": _RECURRENT,
    "xlstm": _RECURRENT,
    "minimax": _RECURRENT,
    "openai-gpt": _MASKS,
    "xlnet": _MASKS,
    "kosmos_2_5_text_model": _POSITIONS,
}
"""Model type in transformers 5.23 -> why its packed documents see each other, as measured."""


def check_packing_support(config: RunConfig) -> None:
    """Raise UserError where a run packs rows and its model's type cannot train them."""
    args = config.trainer.args
    if not args.packs_rows:
        return
    reason = find_packing_problem(_read_config(config.model))
    if reason is not None:
        key = "packing" if args.packing else "eval_packing"
        raise UserError(
            f"trainer.args.{key}=true: {config.model.path} cannot train packed rows: {reason}.\n"
            f"{PACKING_ADVICE}"
        )


def find_packing_problem(content: Mapping[str, Any]) -> str | None:
    """Return why the model of a config.json cannot train packed rows; None if nothing is known."""
    text_config = content.get("text_config")
    fields = {**content, **(text_config if isinstance(text_config, dict) else {})}
    if fields.get("model_type") == "falcon" and fields.get("alibi"):
        return _ALIBI
    return _UNPACKABLE.get(str(fields.get("model_type")))


def _read_config(model: ModelConfig) -> dict[str, Any]:
    """Return a model's config.json; nothing where it cannot be had, which its load explains."""
    try:
        return read_config_json(model)
    except (OSError, ValueError, UserError):
        return {}
